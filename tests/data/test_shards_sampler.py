"""Shards in a new order, and rows within a window of them: each once, wherever a run stopped."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import registry
from engine.data.loader import rank_slice
from engine.data.samplers import shards
from engine.data.samplers.pool import SamplerInputs
from engine.errors import UserError

BLOCKS = st.lists(
    st.one_of(st.none(), st.lists(st.integers(0, 20), min_size=1, max_size=8)),
    min_size=1,
    max_size=3,
)


def make(blocks, batch_size, seed=0, window=2, plain=7):
    sizes = [plain if each is None else sum(each) for each in blocks]
    return sizes, shards.build(
        SamplerInputs(sizes, batch_size, seed, window=window, blocks=lambda: blocks)
    )


@pytest.mark.parametrize("name", ["shards", "shards+window"])
def test_found_by_name(name):
    assert registry.find("data/samplers", name) is shards


@given(blocks=BLOCKS, data=st.data())
@settings(max_examples=80, deadline=None)
def test_exactly_once_an_epoch_over_a_resume_at_another_world(blocks, data):
    sizes, sampler = make([*blocks, [5]], 1)
    batch_size = data.draw(st.integers(1, sum(sizes)))
    window, seed = data.draw(st.integers(1, 5)), data.draw(st.integers(0, 9))
    before, after = data.draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    epoch = data.draw(st.integers(0, 3))
    _, sampler = make([*blocks, [5]], batch_size, seed, window)
    stop = data.draw(st.integers(0, sampler.steps))
    seen = []
    for step in range(sampler.steps):
        if step == stop:
            _, sampler = make([*blocks, [5]], batch_size, seed, window)
        world = before if step < stop else after
        batch = sampler.batch(epoch, step)
        seen += [tuple(r) for rank in range(world) for r in rank_slice(batch, rank, world).tolist()]
    assert sorted(seen) == [(d, row) for d, size in enumerate(sizes) for row in range(size)]


def test_a_batch_depends_on_its_place_alone():
    _, sampler = make([[9, 30, 4], None, [50]], 8)
    for epoch, step in [(3, 4), (0, 0), (3, 4), (1, 2), (0, 11)]:
        fresh = make([[9, 30, 4], None, [50]], 8)[1]
        assert np.array_equal(sampler.batch(epoch, step), fresh.batch(epoch, step))


def order(sampler, epoch):
    return np.concatenate([sampler.batch(epoch, step) for step in range(sampler.steps)])


def test_epochs_and_seeds_differ():
    blocks = [[10] * 20]
    assert not np.array_equal(order(make(blocks, 10)[1], 0), order(make(blocks, 10)[1], 1))
    assert not np.array_equal(order(make(blocks, 10)[1], 0), order(make(blocks, 10, 1)[1], 0))


def test_only_a_window_of_shards_is_read_at_a_time():
    _, sampler = make([[100] * 50], 40, window=5)
    found = order(sampler, 0)[:, 1] // 100
    for start in range(0, 5000, 500):
        assert len(set(found[start : start + 500].tolist())) == 5
    # Within a window the shards are mixed: each batch has rows of nearly all of them.
    assert np.mean([len(set(found[s : s + 40].tolist())) for s in range(0, 5000, 40)]) > 4.5
    # And the windows are not neighbours in the dataset.
    firsts = found[::500]
    assert not np.array_equal(np.sort(firsts), firsts)


def test_rows_are_spread_evenly_within_a_window():
    _, sampler = make([[200] * 4], 100, window=4)
    places = np.zeros(800)
    for epoch in range(60):
        places[order(sampler, epoch)[:, 1]] += np.arange(800)
    means = places / 60 / 800
    assert abs(means.mean() - 0.5) < 0.01
    assert means.std() < 2.0 / np.sqrt(12 * 60)


def test_datasets_without_shards_are_cut_into_parts():
    sampler = shards.build(SamplerInputs([100_000], 64, 0, window=2))
    rows = sampler.batch(0, 3)[:, 1] // 8192
    assert len(set(rows.tolist())) == 2


def test_less_than_a_batch_and_steps_outside():
    with pytest.raises(UserError, match="has 5 samples"):
        shards.build(SamplerInputs([5], 6, 0))
    with pytest.raises(IndexError):
        shards.build(SamplerInputs([5], 5, 0)).batch(0, 1)


def test_ten_thousand_shards_of_ten_thousand_rows():
    start = time.perf_counter()
    sampler = shards.build(
        SamplerInputs([10**8], 4096, 0, window=64, blocks=lambda: [np.full(10_000, 10_000)])
    )
    assert len(np.unique(sampler.batch(7, 20_000)[:, 1] // 10_000)) <= 128
    assert time.perf_counter() - start < 2
    start = time.perf_counter()
    for step in range(20):
        sampler.batch(7, step)
    assert (time.perf_counter() - start) / 20 < 0.1
