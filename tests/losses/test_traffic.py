"""Bytes that a rank sends for a loss and its gradient, counted below all code that is compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.nn  # the peer imports it when first used: once here, not in every rank
import torch.nn.functional as F
from torch import Tensor

import engine.torchvision_ops  # noqa: F401
from engine.config import schema
from engine.dist import collectives
from engine.registry import find
from engine.types import Features
from tests.bench.timing import peak_bytes
from tests.distributed import run

open_clip = pytest.importorskip("open_clip.loss")
ROWS, WIDTH = 64, 512  # of a rank, fp32


@contextmanager
def counted() -> Iterator[list[float]]:
    """Bytes of each call into torch.distributed, sent as a ring sends them."""
    sent: list[float] = []

    def bytes_of(name: str, args: Any, options: Any) -> float:
        n = dist.get_world_size(options.get("group"))
        if name == "batch_isend_irecv":
            return sum(op.tensor.nbytes for op in args[0] if op.op is dist.isend)
        if name == "scatter":  # of a gloo all-to-all: the source sends to all others
            return sum(t.nbytes for t in args[1] or []) * (n - 1) / n
        if name == "all_reduce":
            return 2 * args[0].nbytes * (n - 1) / n
        piece = args[0] if name == "reduce_scatter_tensor" else args[1]
        return piece.nbytes * (n - 1)

    def watched(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **options: Any) -> Any:
            sent.append(bytes_of(name, args, options))
            return call(*args, **options)

        return wrapper

    names = ("all_gather", "all_gather_into_tensor", "reduce_scatter_tensor", "all_reduce",
             "scatter", "batch_isend_irecv")  # fmt: skip
    unwatched = {name: getattr(dist, name) for name in names}
    for name, call in unwatched.items():
        setattr(dist, name, watched(name, call))
    try:
        yield sent
    finally:
        for name, call in unwatched.items():
            setattr(dist, name, call)


def _inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(collectives.rank())
    image, text = (
        F.normalize(torch.randn(ROWS, WIDTH, generator=generator), dim=1).requires_grad_()
        for _ in range(2)
    )
    return image, text, torch.tensor([2.0], requires_grad=True)


def _by_local_loss() -> Tensor:
    me, n = collectives.rank(), collectives.world()
    image, text, log_scale = _inputs()
    peer = open_clip.ClipLoss(local_loss=True, gather_with_grad=True, rank=me, world_size=n)
    return peer(image, text, log_scale.exp())


def _by_ours(name: str, gather: str, tile_size: int | None = None) -> Tensor:
    image, text, log_scale = _inputs()
    shared = {"logit_scale": log_scale, "logit_bias": torch.zeros(1, requires_grad=True)}
    loss = find("losses", name).build(schema.Loss(name=name, gather=gather, tile_size=tile_size))
    return loss(Features({"image_BD": image, "text_BD": text}, shared))["loss"]


def _sent() -> dict[str, tuple[float, float]]:
    """(bytes by the count here, bytes by the engine's own)."""
    collectives.control_group()
    found = {}
    work: dict[str, Callable[[], Tensor]] = {"local loss": _by_local_loss}
    for name in ("NCE", "Sigmoid"):
        for gather in ("all", "ring"):
            work[f"{name} {gather}"] = lambda name=name, gather=gather: _by_ours(name, gather)
    for name, loss in work.items():
        with counted() as sent, collectives.traffic() as own:
            loss().backward()
        found[name] = sum(sent), own.bytes
    return found


@pytest.mark.parametrize("world", [2, 4])
def test_half_of_what_the_local_loss_form_sends(world: int) -> None:
    block = ROWS * WIDTH * 4
    for found in run(_sent, world):
        (local, _) = found["local loss"]
        assert local == 4 * (world - 1) * block  # both sides and both gradients
        for name in ("NCE all", "Sigmoid all"):
            sent, own = found[name]
            assert sent <= 0.55 * local, name
            assert own == pytest.approx(sent, rel=0.01)
        # A ring brings the texts (under NCE twice) and takes their gradient home
        for name, passes in (("NCE ring", 2), ("Sigmoid ring", 1)):
            sent, own = found[name]
            assert sent <= 1.05 * (passes * (world - 1) + world) * block, name
            assert own == pytest.approx(sent, rel=0.01)


def _peak_blocks() -> dict[str, float]:
    """Peak memory beside the inputs, in blocks of one rank's features."""
    collectives.control_group()
    found = {}
    for name in ("NCE", "Sigmoid"):
        for gather in ("all", "ring"):
            options = {"name": name, "gather": gather, "tile_size": 4}
            peak = peak_bytes(lambda options=options: _by_ours(**options).backward())
            found[f"{name} {gather}"] = peak / (ROWS * WIDTH * 4)
    return found


def test_a_ring_holds_the_texts_of_two_other_ranks_and_no_more() -> None:
    three, four = (run(_peak_blocks, world)[0] for world in (3, 4))
    for name in ("NCE", "Sigmoid"):
        # The texts in work and those that arrive, their gradients, and the images' gradient; and
        # the two inputs, and what made them unit vectors
        assert four[f"{name} ring"] <= three[f"{name} ring"] + 0.1
        assert three[f"{name} ring"] + 3 < three[f"{name} all"]
        assert four[f"{name} all"] > three[f"{name} all"] + 1.9
