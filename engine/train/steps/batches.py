"""A rank's batch in parts: which rows make up each sub-batch, and their copy to the device."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from engine.types import Batch, Features

Rows = Tensor | slice


def num_rows(batch: Batch) -> int:
    """B: the first dimension that all tensors share."""
    return next(len(value) for value in batch.values() if _has_rows(value))


class Split:
    """Which rows make up each sub-batch; their numbers differ by one at most.

    ``by_length`` puts rows of similar text length together, the longest last, so that each
    sub-batch is padded to its own longest text only. After them come ``idle`` ones, of the first
    row again, which must leave no trace: passes that other ranks wait for.
    """

    def __init__(
        self,
        batch: Batch,
        parts: int,
        *,
        by_length: bool,
        device: torch.device | None = None,
        idle: int = 0,
    ) -> None:
        n = num_rows(batch)
        ends = [n * part // parts for part in range(parts + 1)]
        self.slices = [slice(start, end) for start, end in itertools.pairwise(ends)]
        self.rows: list[Rows] = list(self.slices)
        self._order = self._inverse = None  # on the device: an index from the host would stall it
        if by_length and "attention_mask_BT" in batch:
            order = lengths(batch["attention_mask_BT"]).argsort(stable=True)
            self.rows = [order[part] for part in self.slices]
            both = torch.stack([order, order.argsort()])
            if device is not None and device.type == "cuda":
                both = both.pin_memory().to(device, non_blocking=True)
            self._order, self._inverse = both.unbind()
        self.rows += [slice(0, 1)] * idle

    def batch_order(self, parts: Sequence[Tensor]) -> Tensor:
        """Rows of all sub-batches, in the order that they have in the batch."""
        rows = torch.cat(list(parts))
        return rows if self._inverse is None else rows[self._inverse]

    def in_parts(self, rows: Tensor) -> list[Tensor]:
        """The inverse of :meth:`batch_order`."""
        rows = rows if self._order is None else rows[self._order]
        return [rows[part] for part in self.slices]


def lengths(mask_BT: Tensor) -> Tensor:
    """Tokens of each row up to the last one that counts, [B]."""
    positions = torch.arange(1, mask_BT.shape[1] + 1, device=mask_BT.device)
    return (mask_BT.ne(0) * positions).amax(dim=1)


def take(batch: Batch, rows: Rows) -> Batch:
    """A sub-batch: its rows of every tensor, and of ``_BT`` tensors the columns that it uses."""
    part = {name: _take(v, rows) if _has_rows(v) else v for name, v in batch.items()}
    mask = part.get("attention_mask_BT")
    if mask is not None and len(mask):
        longest = int(lengths(mask).max())
        part |= {name: value[:, :longest] for name, value in part.items() if name.endswith("_BT")}
    return part


def _take(value: Tensor, rows: Rows) -> Tensor:
    if isinstance(rows, slice) or not value.is_pinned():
        return value[rows]
    part = torch.empty(len(rows), *value.shape[1:], dtype=value.dtype, pin_memory=True)
    return torch.index_select(value, 0, rows, out=part)


def _has_rows(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Tensors on ``device``; from pinned memory without waiting for the copy."""
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        for name, value in batch.items()
    }


class Feed:
    """Takes sub-batches from the host to the device; on CUDA the next while one computes."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # One stream for good: the allocator keeps memory apart by stream
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, batch: Batch, parts: Sequence[Rows]) -> Iterator[Batch]:
        """The sub-batches of ``parts`` one after another."""
        if self._copies is None:
            for rows in parts:
                yield to_device(take(batch, rows), self.device)
            return
        compute = torch.cuda.current_stream(self.device)
        ahead: Batch = {}
        for coming in [*parts, None]:
            ready = ahead
            if coming is not None:
                with torch.cuda.stream(self._copies):
                    ahead = to_device(take(batch, coming), self.device)
            if ready:
                yield ready
            compute.wait_stream(self._copies)
            for value in ahead.values():
                if isinstance(value, Tensor) and value.is_cuda:
                    value.record_stream(compute)


def reported(losses: dict[str, Tensor], features: Features) -> dict[str, Tensor]:
    """What a step reports: its losses, and the numbers among the features' ``info``."""
    numbers = {
        name: torch.as_tensor(value)
        for name, value in features.info.items()
        if isinstance(value, int | float) or (isinstance(value, Tensor) and value.numel() == 1)
    }
    return numbers | {name: value.detach() for name, value in losses.items()}
