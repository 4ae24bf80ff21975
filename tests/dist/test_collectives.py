"""Collectives against what one process computes, on 1, 2 and 3 gloo ranks of uneven rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from engine.dist import collectives as c
from tests.distributed import run
from tests.traffic import counted

COUNTS = [3, 0, 2]


def _rows(rank: int, n: int) -> torch.Tensor:
    return 100.0 * rank + torch.arange(2.0 * n).view(n, 2)


def _row_collectives() -> dict[str, Any]:
    me, n = c.rank(), c.world()
    counts = c.row_counts(COUNTS[me])
    with counted() as sent:
        gathered = c.all_gather_rows(_rows(me, counts[me]), counts)
    total = sum(counts)
    scattered = c.reduce_scatter_rows((me + 1.0) * torch.arange(2.0 * total).view(total, 2), counts)
    shifted = c.start_shift(_rows(me, counts[me]), counts[(me - 1) % n])()
    return {
        "counts": counts,
        "gathered": gathered,
        "scattered": scattered,
        "shifted": shifted,
        "bytes": sum(sent),
        "max": c.all_reduce_(torch.tensor([float(me)]), "max"),
        "sum": c.all_reduce_(torch.tensor([float(me)])),
    }


@pytest.mark.parametrize("world", [2, 3])
def test_rows_over_ranks(world: int) -> None:
    counts = COUNTS[:world]
    whole = torch.cat([_rows(rank, n) for rank, n in enumerate(counts)])
    factor = sum(range(1, world + 1))
    scattered = (factor * torch.arange(2.0 * sum(counts)).view(-1, 2)).split(counts)
    for rank, got in enumerate(run(_row_collectives, world)):
        assert got["counts"] == counts
        assert torch.equal(got["gathered"], whole)
        assert torch.equal(got["scattered"], scattered[rank])
        before = (rank - 1) % world
        assert torch.equal(got["shifted"], _rows(before, counts[before]))
        assert got["bytes"] == (world - 1) * max(counts) * 2 * 4
        assert got["max"] == world - 1
        assert got["sum"] == sum(range(world))


def _messages() -> tuple[Any, ...]:
    me = c.rank()
    said = c.all_gather_json({"rank": me, "text": "é" * (5 * me), "list": [1, None]})
    told = c.broadcast_json({"from": me, "n": 1.5}, src=1)
    c.barrier()
    return said, told, c.any_true(me == 1), c.any_true(False)


def test_json_messages() -> None:
    for said, told, some, none in run(_messages, 2):
        assert said == [{"rank": me, "text": "é" * (5 * me), "list": [1, None]} for me in range(2)]
        assert told == {"from": 1, "n": 1.5}
        assert some
        assert not none


def _groups() -> tuple[list[int], list[int], bool, bool]:
    group = c.subgroup(2)
    assert group is not None
    same = c.subgroup(2) is group
    members = dist.get_process_group_ranks(group)
    return members, c.row_counts(10 + c.rank(), group), same, c.subgroup(-1) is None


def test_subgroups_of_consecutive_ranks() -> None:
    expected = [[0, 1], [0, 1], [2]]
    for (members, counts, same, everyone), want in zip(run(_groups, 3), expected, strict=True):
        assert members == want
        assert counts == [10 + rank for rank in want]
        assert same
        assert everyone


def test_one_process_without_init() -> None:
    x = torch.arange(6.0).view(3, 2)
    assert (c.world(), c.rank(), c.row_counts(3)) == (1, 0, [3])
    assert c.control_group() is None
    assert c.subgroup(4) is None
    with counted() as sent:
        assert torch.equal(c.all_gather_rows(x, [3]), x)
        assert torch.equal(c.reduce_scatter_rows(x, [3]), x)
        assert torch.equal(c.all_reduce_(x.clone(), "max"), x)
        assert torch.equal(c.start_shift(x, 3)(), x)
    assert sent == []
    assert c.any_true(True)
    assert not c.any_true(False)
    assert c.all_gather_json({"a": (1, 2)}) == [{"a": [1, 2]}]
    assert c.broadcast_json([1]) == [1]
    c.barrier()


def _fails_on_rank_1() -> None:
    if c.rank() == 1:
        raise ValueError("rank one fails")
    c.barrier()


def test_an_exception_surfaces() -> None:
    with pytest.raises(Exception, match="rank one fails"):
        run(_fails_on_rank_1, 2)
