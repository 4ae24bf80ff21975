"""Decoupled accumulation against the undivided loss in fp64, on one rank and on several."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from engine.dist import collectives
from tests.distributed import run
from tests.train import tiny

COUNTS = {1: [11], 2: [9, 7], 4: [5, 6, 4, 5]}
ROWS = 3  # of a sub-batch: uneven parts in every case above
KEEPS = (0, 1, 2, 99)


def _divided(counts: list[int], keep: Any, sort: bool) -> dict[str, Any]:
    model = tiny.replicas(tiny.make_model())
    step = tiny.make_step(tiny.TinyTask(rows_interact=not sort), model, ROWS, keep)
    losses = step(tiny.make_batch(counts, collectives.rank()), tiny.STEP)
    return {"losses": losses, "gradients": tiny.gradients(model)}


def _all_keeps(counts: list[int]) -> list[dict[str, Any]]:
    return [_divided(counts, keep, sort) for sort in (True, False) for keep in KEEPS]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_gradients_equal_the_undivided_loss(world: int) -> None:
    counts = COUNTS[world]
    by_rank = run(_all_keeps, world, counts) if world > 1 else [_all_keeps(counts)]
    for sort in (True, False):
        loss, want = tiny.oracle(tiny.make_model(), counts, ROWS, sort)
        cases = slice(0, 4) if sort else slice(4, 8)
        for results in zip(*(rank[cases] for rank in by_rank), strict=True):
            mean = sum(result["losses"]["loss"] for result in results) / world
            assert abs(mean - loss) < 1e-12
            for result in results:
                assert tiny.largest_error(result["gradients"], want) < 1e-10
                assert result["losses"]["in_order"] == 1.0
                assert result["losses"].keys() == {"loss", "caption", "lam", "in_order"}
        first, *others = (result["gradients"] for result in by_rank[0][cases])
        for other in others:  # a run resumed with other memory free continues bit for bit
            assert all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize(("keep", "second"), [(0, 4), (1, 3), (3, 1), (4, 0), (9, 0)])
def test_only_sub_batches_without_graph_run_twice(keep: int, second: int) -> None:
    task, model = tiny.TinyTask(), tiny.make_model()
    tiny.make_step(task, model, ROWS, keep)(tiny.make_batch([11], 0), tiny.STEP)
    assert task.passes == [False] * second + [True] * 4


def test_one_sub_batch_is_the_plain_step() -> None:
    batch, model = tiny.make_batch([6], 0), tiny.make_model()
    plain = tiny.make_step(tiny.TinyTask(), model, None)(batch, tiny.STEP)
    want = tiny.gradients(model)
    for keep in (0, 1, "auto"):
        losses = tiny.make_step(tiny.TinyTask(), model, 6, keep)(batch, tiny.STEP)
        got = tiny.gradients(model)
        assert losses == plain
        assert all(torch.equal(got[name], want[name]) for name in want)


def _one_sub_batch_each() -> bool:
    batch = tiny.make_batch([4, 6], collectives.rank())
    model = tiny.replicas(tiny.make_model())
    tiny.make_step(tiny.TinyTask(), model, None)(batch, tiny.STEP)
    want = tiny.gradients(model)
    tiny.make_step(tiny.TinyTask(), model, 6)(batch, tiny.STEP)
    got = tiny.gradients(model)
    return all(torch.equal(got[name], want[name]) for name in want)


def test_one_sub_batch_is_the_plain_step_on_two_ranks() -> None:
    assert run(_one_sub_batch_each, 2) == [True, True]


def test_random_numbers_depend_on_the_step_and_leave_the_generator() -> None:
    batch, model = tiny.make_batch([9], 0), tiny.make_model()
    step = tiny.make_step(tiny.TinyTask(), model, ROWS)
    state = torch.get_rng_state()
    first = step(batch, 5)["loss"]
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(7)
    assert step(batch, 5)["loss"] == first
    assert step(batch, 6)["loss"] != first


def _dropout_of_this_rank() -> float:
    model = tiny.replicas(tiny.make_model())
    step = tiny.make_step(tiny.TinyTask(), model, 4)
    return float(step(tiny.make_batch([4], 0), tiny.STEP)["caption"])  # equal rows


def test_ranks_drop_different_units() -> None:
    first, second = run(_dropout_of_this_rank, 2)
    assert first != second


@pytest.mark.parametrize("keep", KEEPS)
def test_batch_norm_statistics_are_those_of_one_pass(keep: int) -> None:
    batch = tiny.make_batch([11], 0)
    once = tiny.make_model(norm=True)
    _, want = tiny.oracle(once, [11], ROWS)
    model = tiny.make_model(norm=True)
    tiny.make_step(tiny.TinyTask(), model, ROWS, keep)(batch, tiny.STEP)
    assert tiny.largest_error(tiny.gradients(model), want) < 1e-10
    for (name, got), expected in zip(model.named_buffers(), once.buffers(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12, msg=name)
    assert int(model.image[2].num_batches_tracked) == 4
    assert model.image[2].track_running_stats


def _count_reductions(keep: Any) -> tuple[list[int], bool]:
    model = tiny.replicas(tiny.make_model(norm=True))
    assert isinstance(model.wrapped, DistributedDataParallel)
    seen: list[int] = []

    def hook(state, bucket):  # type: ignore[no-untyped-def]  # DDP reads annotations as objects
        seen.append(bucket.buffer().numel())
        return allreduce_hook(None, bucket)

    model.wrapped.register_comm_hook(None, hook)
    step = tiny.make_step(tiny.TinyTask(), model, 3, keep)
    me = collectives.rank()
    for number in range(4):
        step(tiny.make_batch([12, 9], me), number)
        total = sum(p.grad.sum() for p in model.parameters() if p.grad is not None)
        model.zero_grad(set_to_none=True)
    totals = collectives.all_gather_json(float(total))
    return seen, totals[0] == totals[1]


@pytest.mark.parametrize("keep", [0, 2, 99, "auto"])
def test_gradients_are_reduced_once_a_step(keep: Any) -> None:
    parameters = sum(p.numel() for p in tiny.make_model(norm=True).parameters())
    for seen, equal in run(_count_reductions, 2, keep):
        assert seen == [parameters] * 4
        assert equal
