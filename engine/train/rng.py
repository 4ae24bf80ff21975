"""Randomness as a pure function of seeds: no part of a run depends on what was drawn before it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def derive(*numbers: int) -> int:
    """A 63-bit seed that depends on each number and on their order (BLAKE2b)."""
    text = ",".join(str(int(number)) for number in numbers)
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@contextmanager
def isolated(seed: int, device: torch.device) -> Iterator[None]:
    """Within the block torch draws from ``seed`` on the CPU and on ``device``.

    Afterwards both generators are as they were. Does not wait for the device.
    """
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(cuda):
        torch.default_generator.manual_seed(seed)
        for each in cuda:
            with torch.cuda.device(each):
                torch.cuda.manual_seed(seed)
        yield
