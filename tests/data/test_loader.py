"""The loader: the same batches for any number of workers, resumable anywhere, bad samples told."""

import os
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data import loader
from engine.data.samplers import debias, sequential, shuffle
from engine.data.samplers.pool import SamplerInputs
from engine.errors import FaultError, UserError
from tests.data.drawn_source import Drawn, collate, noisy

SAMPLERS = {"shuffle": shuffle, "sequential": sequential, "debias": debias}


def batches(sizes=(30, 22), batch_size=8, name="shuffle", bad=None, epochs=2, **options):
    sources = [Drawn(f"d{i}", size, (bad or {}).get(i)) for i, size in enumerate(sizes)]
    sampler = SAMPLERS[name].build(SamplerInputs(sizes, batch_size, 3))
    steps = options.pop("steps_per_epoch", sampler.steps)
    settings_ = {
        "first_step": 0,
        "total_steps": steps * epochs,
        "steps_per_epoch": steps,
        "rank": 0,
        "world": 1,
        "seed": 5,
        "num_workers": 0,
        **options,
    }
    transform, make = settings_.pop("transform", noisy), settings_.pop("collate", collate)
    return loader.train_batches(sources, sampler, transform, make, **settings_)


def rows(batch):
    return [tuple(row) for row in batch["row_B2"].tolist()]


def same(one, other):
    assert one[0] == other[0]
    assert one[2] == other[2]
    assert one[1].keys() == other[1].keys()
    for name, value in one[1].items():
        equal = torch.equal(value, other[1][name]) if isinstance(value, torch.Tensor) else None
        assert equal if equal is not None else value == other[1][name]


BAD = {0: {3: "truncated", 9: "no caption"}, 1: {0: "truncated"}}


@pytest.mark.parametrize("name", SAMPLERS)
def test_batches_are_equal_for_any_number_of_workers(name):
    runs = [list(batches(name=name, bad=BAD, num_workers=count)) for count in (0, 1, 2)]
    assert len(runs[0]) == len(runs[1]) == len(runs[2]) >= 12
    for items in zip(*runs, strict=True):
        same(items[0], items[1])
        same(items[0], items[2])


def blank(batch):
    return batch | {"blank": True}


@pytest.mark.parametrize("workers", [0, 1])
def test_a_rank_without_a_sample_takes_part_with_anothers(workers):
    options = {"sizes": (9,), "batch_size": 3, "epochs": 1, "num_workers": workers}
    step = [row for _, row in rows([batch for _, batch, _ in batches(**options)][1])]
    bad = {0: {step[0]: "truncated", step[1]: "no caption"}}
    options |= {"bad": bad, "world": 3, "blank": blank}
    ranks = [list(batches(rank=rank, **options)) for rank in range(3)]
    found = [(rows(one[1][1]), "blank" in one[1][1], len(one[1][2])) for one in ranks]
    one = [(0, step[2])]
    assert found == [(one, True, 1), (one, True, 1), (one, False, 0)]
    assert not any("blank" in batch for one in ranks for _, batch, _ in (one[0], one[2]))
    bad[0][step[2]] = "truncated"
    with pytest.raises(FaultError, match="step 1: none of this process's 1 samples can be used"):
        list(batches(rank=0, **options))


@given(
    name=st.sampled_from(["shuffle", "sequential"]),
    before=st.integers(1, 4),
    after=st.integers(1, 4),
    data=st.data(),
)
@settings(max_examples=15, deadline=None)
def test_exactly_once_over_a_resume_at_another_world(name, before, after, data):
    stop = data.draw(st.integers(0, 7))
    seen = []
    for world, first, end in ((before, 0, stop), (after, stop, 7)):
        for rank in range(world):
            for _, batch, _ in batches(name=name, first_step=first, total_steps=end, rank=rank,
                                       world=world):  # fmt: skip
                seen += rows(batch)
    assert sorted(seen) == [(0, i) for i in range(30)] + [(1, i) for i in range(22)]


def test_debias_over_a_resume_at_another_world_goes_on_with_the_pass():
    seen = []
    for world, first, end in ((3, 0, 5), (2, 5, 13)):
        for rank in range(world):
            for _, batch, _ in batches(name="debias", first_step=first, total_steps=end, rank=rank,
                                       world=world, epochs=3):  # fmt: skip
                seen += rows(batch)
    for dataset, size in enumerate((30, 22)):
        counts = [seen.count((dataset, row)) for row in range(size)]
        assert max(counts) - min(counts) <= 1


def test_a_resume_continues_the_same_batches():
    whole, later = list(batches(bad=BAD)), list(batches(bad=BAD, first_step=9))
    assert [step for step, _, _ in later] == list(range(9, 14))
    for one, other in zip(whole[9:], later, strict=True):
        same(one, other)


def test_augmentation_depends_on_the_sample_and_epoch_alone():
    def images(**options):
        found = {}
        for step, batch, _ in batches(**options):
            for row, image, seed in zip(
                rows(batch), batch["image_BCHW"], batch["seed_B"], strict=True
            ):
                found[step // 7, row] = (image, seed)
        return found

    alone = images()
    shared = {k: v for rank in range(3) for k, v in images(rank=rank, world=3).items()}
    assert alone.keys() == shared.keys()
    for place, (image, seed) in alone.items():
        assert torch.equal(image, shared[place][0])
        assert seed == shared[place][1]
    assert not torch.equal(alone[0, (0, 1)][0], alone[1, (0, 1)][0])
    assert len({seed for _, seed in alone.values()}) == len(alone)


def test_the_collates_draws_differ_between_ranks_and_steps():
    draws = [
        tuple(batch["draw"].tolist())
        for rank in range(2)
        for _, batch, _ in batches(rank=rank, world=2)
    ]
    assert len(set(draws)) == len(draws)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_global_generators_are_left_as_they_were(num_workers):
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    for _ in batches(num_workers=num_workers, epochs=1):
        assert torch.equal(torch.get_rng_state(), before[0])
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert random.getstate() == before[2]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_samples_are_left_out_and_reported(num_workers):
    seen, found = [], []
    for step, batch, bad in batches(bad=BAD, num_workers=num_workers, epochs=1):
        seen += rows(batch)
        found += bad
        assert all(record.step == step for record in bad)
    assert sorted((r.dataset, r.index, r.key, r.cause) for r in found) == [
        ("d0", 3, "3.png", "truncated"),
        ("d0", 9, "row 9", "no caption"),
        ("d1", 0, "0.png", "truncated"),
    ]
    assert len(seen) == 52 - 3
    assert {(0, 3), (0, 9), (1, 0)}.isdisjoint(seen)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_batch_without_a_usable_sample_ends_the_run(num_workers):
    bad = {0: dict.fromkeys(range(16), "truncated")}
    with pytest.raises(FaultError, match=r"step 0: none .* 8 samples .* 8 truncated \(d0 \d+.png"):
        list(batches((16,), bad=bad, num_workers=num_workers))


def refuse(samples):
    raise UserError("no such template", key="model.template")


def fail(samples):
    raise ZeroDivisionError("a fault of ours")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_errors_in_workers_arrive_as_they_are(num_workers):
    with pytest.raises(UserError, match=r"^no such template$") as error:
        list(batches(collate=refuse, num_workers=num_workers))
    assert error.value.key == "model.template"
    with pytest.raises(ZeroDivisionError, match="a fault of ours"):
        list(batches(collate=fail, num_workers=num_workers))


def test_batches_smaller_than_the_world_are_refused_at_the_start():
    with pytest.raises(UserError, match="at least 8") as error:
        next(batches((30,), batch_size=4, world=4))
    assert error.value.key == "data.batch_size"


def test_an_epoch_may_be_cut_short():
    order = [rows(batch) for _, batch, _ in batches(steps_per_epoch=2, epochs=2)]
    whole = [rows(batch) for _, batch, _ in batches(epochs=2)]
    assert order == whole[0:2] + whole[7:9]


def test_a_run_that_is_complete_yields_nothing():
    assert list(batches(first_step=14)) == []
    assert list(batches(first_step=14, num_workers=2)) == []


def threads_and_process(samples):
    return {"threads": torch.get_num_threads(), "process": os.getpid()}


def test_workers_have_one_thread_and_live_through_all_epochs():
    found = [batch for _, batch, _ in batches(collate=threads_and_process, num_workers=2, epochs=3)]
    assert {batch["threads"] for batch in found} == {1}
    processes = {batch["process"] for batch in found}
    assert len(processes) == 2
    assert os.getpid() not in processes


def test_default_workers_share_the_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert [loader.default_workers(world) for world in (1, 2, 4, 12, 13)] == [8, 6, 3, 1, 0]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert loader.default_workers(64) == 6


# evaluation


def valid(rows_, source=None, **options):
    settings_ = {"batch_size": 4, "num_workers": 0, **options}
    source = source or Drawn("v", 20)
    return loader.valid_batches(source, np.array(rows_), noisy, collate, **settings_)


@given(
    chosen=st.lists(st.integers(0, 19), unique=True, max_size=20),
    world=st.integers(1, 4),
    batch_size=st.integers(1, 9),
)
@settings(max_examples=15, deadline=None)
def test_valid_rows_come_once_in_order_without_padding(chosen, world, batch_size):
    seen = []
    for rank in range(world):
        for _, batch, bad in valid(chosen, rank=rank, world=world, batch_size=batch_size):
            assert not bad
            assert 1 <= len(rows(batch)) <= -(-batch_size // world)
            seen += rows(batch)
    assert seen == [(0, row) for row in chosen]


def test_valid_batches_repeat_and_carry_no_seed():
    for first, again in zip(valid(range(9)), valid(range(9), num_workers=1), strict=True):
        same(first, again)
        assert set(first[1]["seed_B"]) == {None}
    ((_, batch, _),) = valid([7], dataset=2)
    assert rows(batch) == [(2, 7)]


def test_valid_batches_report_bad_samples_and_go_on():
    source = Drawn("v", 12, {1: "no caption", **dict.fromkeys(range(4, 8), "truncated")})
    first, empty, last = valid(range(12), source)
    assert rows(first[1]) == [(0, 0), (0, 2), (0, 3)]
    assert [record.index for record in first[2]] == [1]
    assert empty[1] == {}
    assert len(empty[2]) == 4
    assert len(rows(last[1])) == 4
    assert [number for number, _, _ in (first, empty, last)] == [0, 1, 2]
