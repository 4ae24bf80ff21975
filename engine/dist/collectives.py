"""Collectives over rows that differ in number from rank to rank; all of them work in one process.

Ranks need not hold equally many rows (last batches, skipped samples): the caller passes every
rank's ``counts``, which ``row_counts`` gets over a CPU group that never waits for the device.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup | None  # None: every rank


def world(group: Group = None) -> int:
    """How many ranks there are; 1 where torch.distributed is not initialised."""
    return dist.get_world_size(group) if dist.is_initialized() else 1


def rank(group: Group = None) -> int:
    """This rank's number in the group; 0 where torch.distributed is not initialised."""
    return dist.get_rank(group) if dist.is_initialized() else 0


def barrier() -> None:
    """Wait on the CPU for every rank."""
    if world() > 1:
        dist.barrier(group=control_group())


@functools.lru_cache(maxsize=4)
def _control_group(everyone: dist.ProcessGroup) -> dist.ProcessGroup:
    return everyone if dist.get_backend(everyone) == "gloo" else dist.new_group(backend="gloo")


def control_group() -> Group:
    """The gloo group of all ranks for small CPU messages. The first call must be everyone's."""
    return _control_group(dist.group.WORLD) if dist.is_initialized() else None


@functools.lru_cache(maxsize=16)
def _subgroup(everyone: dist.ProcessGroup, size: int) -> dist.ProcessGroup:
    firsts = range(0, everyone.size(), size)
    groups = [dist.new_group(list(range(n, min(n + size, everyone.size())))) for n in firsts]
    return groups[everyone.rank() // size]


def subgroup(size: int) -> Group:
    """The group of ``size`` consecutive ranks that holds this one; all ranks for -1 or ≥ world.

    The last group is smaller where ``size`` does not divide the world. Every rank must make the
    first call with a given size.
    """
    if size < 1 or size >= world():
        return None
    return _subgroup(dist.group.WORLD, size)


def row_counts(n: int, group: Group = None) -> list[int]:
    """How many rows each rank of the group holds, in rank order. Every rank of the world calls."""
    if world() == 1:
        return [n]
    counts = torch.zeros(world(), dtype=torch.int64)
    dist.all_gather_into_tensor(counts, torch.tensor([n]), group=control_group())
    members = range(world()) if group is None else dist.get_process_group_ranks(group)
    return [int(counts[member]) for member in members]


def all_gather_rows(x: Tensor, counts: Sequence[int], group: Group = None) -> Tensor:
    """All ranks' rows one after another, ``[sum(counts), …]``. No gradient flows through."""
    n = world(group)
    if n == 1:
        return x
    padded = _padded(x.detach(), max(counts)).contiguous()
    out = padded.new_empty(n * len(padded), *padded.shape[1:])
    dist.all_gather_into_tensor(out, padded, group=group)
    if min(counts) == max(counts):
        return out
    return torch.cat([part[:k] for part, k in zip(out.chunk(n), counts, strict=True)])


def reduce_scatter_rows(x: Tensor, counts: Sequence[int], group: Group = None) -> Tensor:
    """This rank's rows of the sum over ranks of ``x`` ``[sum(counts), …]``."""
    n = world(group)
    if n == 1:
        return x
    longest = max(counts)
    if min(counts) < longest:
        x = torch.cat([_padded(part, longest) for part in x.split(list(counts))])
    out = x.new_empty(longest, *x.shape[1:])
    dist.reduce_scatter_tensor(out, x.contiguous(), group=group)
    return out[: counts[rank(group)]]


def _padded(x: Tensor, rows: int) -> Tensor:
    return x if len(x) == rows else torch.cat([x, x.new_zeros(rows - len(x), *x.shape[1:])])


def all_reduce_(x: Tensor, op: Literal["sum", "max", "min"] = "sum", group: Group = None) -> Tensor:
    """Reduce ``x`` over the group in place, and return it."""
    if world(group) > 1:
        dist.all_reduce(x, getattr(dist.ReduceOp, op.upper()), group=group)
    return x


def start_shift(x: Tensor, rows: int, group: Group = None) -> Callable[[], Tensor]:
    """Start to send ``x`` to the next rank of a ring, and ``rows`` rows from the one before.

    Returns a function that waits and gives the rows received, so that work can overlap with it.
    """
    n, me = world(group), rank(group)
    if n == 1:
        return lambda: x
    x = x.contiguous()
    received = x.new_empty(rows, *x.shape[1:])
    to, source = (me + 1) % n, (me - 1) % n
    transfers = [
        dist.P2POp(dist.isend, x, group=group, group_peer=to),
        dist.P2POp(dist.irecv, received, group=group, group_peer=source),
    ]
    requests = dist.batch_isend_irecv([t for t in transfers if len(t.tensor)])

    def wait() -> Tensor:
        for request in requests:
            request.wait()
        return received

    return wait


def any_true(flag: bool) -> bool:
    """Whether any rank says so (a stop request, say)."""
    return any(all_gather_json(flag))


def all_gather_json(obj: Any) -> list[Any]:
    """Every rank's JSON value, in rank order; sent as text, never pickled."""
    if world() == 1:
        return [json.loads(json.dumps(obj))]
    text = _bytes(obj)
    counts = row_counts(len(text))
    padded = _padded(text, max(counts))
    out = padded.new_empty(world() * len(padded))
    dist.all_gather_into_tensor(out, padded, group=control_group())
    return [_value(part[:k]) for part, k in zip(out.chunk(world()), counts, strict=True)]


def broadcast_json(obj: Any, src: int = 0) -> Any:
    """Rank ``src``'s JSON value on every rank; what the others pass is ignored."""
    if world() == 1:
        return json.loads(json.dumps(obj))
    text = _bytes(obj if rank() == src else None)
    size = torch.tensor([len(text)])
    dist.broadcast(size, src, group=control_group())
    text = text if rank() == src else text.new_empty(int(size.item()))
    dist.broadcast(text, src, group=control_group())
    return _value(text)


def _bytes(obj: Any) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(obj).encode()), dtype=torch.uint8)


def _value(text: Tensor) -> Any:
    return json.loads(bytes(text.tolist()))
