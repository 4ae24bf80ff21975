"""Counts what a rank sends, below all code that is compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor


@contextmanager
def counted() -> Iterator[list[float]]:
    """Bytes of each call into torch.distributed, sent as a ring sends them.

    Only those of floating-point tensors: counts of rows and JSON go over the control group.
    """
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
            tensors = [op.tensor for op in args[0]] if name == "batch_isend_irecv" else args
            if any(isinstance(t, Tensor) and t.is_floating_point() for t in _flat(tensors)):
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


def _flat(values: Any) -> Iterator[Any]:
    for value in values:
        yield from _flat(value) if isinstance(value, list | tuple) else [value]
