"""Samplers: exactly once, whatever the world size and wherever a run stopped."""

import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import registry
from engine.config.schema import DebiasSampling
from engine.data.loader import rank_slice
from engine.data.samplers import debias, sequential, shuffle
from engine.data.samplers.pool import SamplerInputs
from engine.errors import UserError

MODULES = {"shuffle": shuffle, "sequential": sequential, "debias": debias}
SIZES = st.lists(st.integers(1, 60), min_size=1, max_size=4)


def rows_of_ranks(sampler, epoch, step, world):
    """A global batch put together again from what each rank would read."""
    batch = sampler.batch(epoch, step)
    return [tuple(row) for rank in range(world) for row in rank_slice(batch, rank, world).tolist()]


@pytest.mark.parametrize("name", MODULES)
def test_found_by_name(name):
    assert registry.find("data/samplers", name) is MODULES[name]
    assert "pool" not in registry.names("data/samplers")


@pytest.mark.parametrize("name", ["shuffle", "sequential"])
@given(sizes=SIZES, data=st.data(), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_exactly_once_an_epoch_over_a_resume_at_another_world(name, sizes, data, seed):
    batch_size = data.draw(st.integers(1, sum(sizes)))
    before, after = data.draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    epoch = data.draw(st.integers(0, 3))
    sampler = MODULES[name].build(SamplerInputs(sizes, batch_size, seed))
    stop = data.draw(st.integers(0, sampler.steps))
    seen = [row for s in range(stop) for row in rows_of_ranks(sampler, epoch, s, before)]
    resumed = MODULES[name].build(SamplerInputs(sizes, batch_size, seed))
    for step in range(stop, resumed.steps):
        seen += rows_of_ranks(resumed, epoch, step, after)
    assert sorted(seen) == [(d, row) for d, size in enumerate(sizes) for row in range(size)]


@pytest.mark.parametrize("name", ["shuffle", "sequential"])
@given(sizes=SIZES, data=st.data())
@settings(max_examples=60, deadline=None)
def test_batches_are_full_but_for_the_last_two(name, sizes, data):
    batch_size = data.draw(st.integers(1, sum(sizes)))
    sampler = MODULES[name].build(SamplerInputs(sizes, batch_size, 0))
    lengths = [len(sampler.batch(0, step)) for step in range(sampler.steps)]
    assert all(length == batch_size for length in lengths[:-2])
    assert min(lengths) >= batch_size // 2
    assert min(lengths) == lengths[-1]
    assert max(lengths) <= batch_size


@given(
    sizes=st.lists(st.integers(5, 40), min_size=1, max_size=4),
    batch_size=st.integers(1, 5),
    data=st.data(),
)
@settings(max_examples=12, deadline=None)
def test_debias_shows_each_row_once_a_pass_over_a_resume_at_another_world(sizes, batch_size, data):
    before, after = data.draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    sampler = debias.build(SamplerInputs(sizes, batch_size, 3))
    steps = [(epoch, step) for epoch in range(4) for step in range(sampler.steps)]
    stop = data.draw(st.integers(0, len(steps)))
    seen = [row for at in steps[:stop] for row in rows_of_ranks(sampler, *at, before)]
    resumed = debias.build(SamplerInputs(sizes, batch_size, 3))
    seen += [row for at in steps[stop:] for row in rows_of_ranks(resumed, *at, after)]
    for dataset, size in enumerate(sizes):
        shown = [row for d, row in seen if d == dataset]
        for first in range(0, len(shown), size):
            one_pass = shown[first : first + size]
            assert len(set(one_pass)) == len(one_pass)


@pytest.mark.parametrize("name", MODULES)
@given(sizes=st.lists(st.integers(8, 40), min_size=1, max_size=4), data=st.data())
@settings(max_examples=40, deadline=None)
def test_a_batch_depends_on_its_place_alone(name, sizes, data):
    sampler = MODULES[name].build(SamplerInputs(sizes, 8, 5))
    places = st.tuples(st.integers(0, 5), st.integers(0, sampler.steps - 1))
    for epoch, step in data.draw(st.lists(places, min_size=1, max_size=6)):  # in any order
        fresh = MODULES[name].build(SamplerInputs(sizes, 8, 5))
        assert np.array_equal(sampler.batch(epoch, step), fresh.batch(epoch, step))


@pytest.mark.parametrize("name", MODULES)
def test_epochs_and_seeds_differ(name):
    def order(seed, epoch):
        sampler = MODULES[name].build(SamplerInputs([40, 40], 8, seed))
        return np.concatenate([sampler.batch(epoch, s) for s in range(sampler.steps)])

    assert not np.array_equal(order(0, 0), order(0, 1))
    assert not np.array_equal(order(0, 0), order(1, 0))


@pytest.mark.parametrize("name", MODULES)
def test_batches_are_int64_pairs(name):
    batch = MODULES[name].build(SamplerInputs([20, 30], 10, 0)).batch(0, 0)
    assert batch.dtype == np.int64
    assert batch.shape == (10, 2)


@pytest.mark.parametrize("name", MODULES)
def test_a_step_outside_the_epoch_raises(name):
    sampler = MODULES[name].build(SamplerInputs([20], 10, 0))
    with pytest.raises(IndexError):
        sampler.batch(0, sampler.steps)


@pytest.mark.parametrize("name", ["shuffle", "sequential"])
def test_less_than_a_batch_of_samples_is_the_users_mistake(name):
    with pytest.raises(UserError, match="has 30 samples") as error:
        MODULES[name].build(SamplerInputs([10, 20], 32, 0))
    assert error.value.key == "data.batch_size"


def test_sequential_goes_through_the_datasets_in_order():
    sampler = sequential.build(SamplerInputs([10, 25, 5], 8, 1))
    order = np.concatenate([sampler.batch(0, s) for s in range(sampler.steps)])
    assert order[:, 0].tolist() == [0] * 10 + [1] * 25 + [2] * 5
    assert order[:10, 1].tolist() != list(range(10))


def test_shuffle_mixes_the_datasets():
    batch = shuffle.build(SamplerInputs([500, 500], 200, 0)).batch(0, 0)
    assert 60 < (batch[:, 0] == 0).sum() < 140


def test_ranks_take_contiguous_shares_that_differ_by_one():
    shares = [rank_slice(list(range(11)), rank, 4) for rank in range(4)]
    assert shares == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10]]
    assert rank_slice([1, 2], 2, 3) == []


# debias


def drawn(sampler, epochs):
    """The dataset of every step; asserts that a batch has only one."""
    found = []
    for epoch in range(epochs):
        for step in range(sampler.steps):
            datasets = np.unique(sampler.batch(epoch, step)[:, 0])
            assert len(datasets) == 1
            found.append(int(datasets[0]))
    return found


def test_debias_draws_datasets_in_proportion_to_their_sizes():
    sampler = debias.build(SamplerInputs([600, 300, 100], 10, 0))
    for epoch in range(5):
        counts = Counter(int(sampler.batch(epoch, step)[0, 0]) for step in range(sampler.steps))
        assert [counts[d] for d in range(3)] == [60, 30, 10]


def test_debias_rounds_without_bias_over_epochs():
    sizes, epochs = [47, 31, 22], 120
    counts = Counter(drawn(debias.build(SamplerInputs(sizes, 20, 4)), epochs))  # 5 steps an epoch
    for dataset, size in enumerate(sizes):
        assert counts[dataset] == pytest.approx(5 * epochs * size / 100, rel=0.1)


def test_debias_draws_are_spread_over_the_epoch():
    order = np.array(drawn(debias.build(SamplerInputs([5000, 5000], 10, 0)), 1))
    assert abs((order[:500] == 0).mean() - 0.5) < 0.08
    assert (order[1:] == order[:-1]).mean() == pytest.approx(0.5, abs=0.08)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (DebiasSampling(weights={"a": 100.0, "b": 100.0}), 0.5),
        (DebiasSampling(weights={"b": 900.0}), 0.5),
        (DebiasSampling(temperature=2.0), 0.75),
        (DebiasSampling(temperature=0.01), 1.0),
    ],
)
def test_debias_weights_and_temperature(options, expected):
    sampler = debias.build(SamplerInputs([900, 100], 1, 0, ["a", "b"], options))
    order = np.array(drawn(sampler, 1))
    assert (order == 0).mean() == pytest.approx(expected, abs=0.002)


def test_debias_refuses_a_dataset_smaller_than_the_batch():
    with pytest.raises(UserError, match="small has 9 samples") as error:
        debias.build(SamplerInputs([100, 9], 10, 0, ["large", "small"]))
    assert error.value.key == "data.batch_size"


def test_debias_repeats_a_small_dataset_where_that_is_allowed():
    sampler = debias.build(
        SamplerInputs([100, 4], 10, 0, debias=DebiasSampling(allow_repeats=True, temperature=100.0))
    )
    batches = [sampler.batch(0, step) for step in range(sampler.steps)]
    small = np.concatenate([batch[:, 1] for batch in batches if batch[0, 0] == 1])
    assert len(small) >= 40
    assert all(sorted(small[i : i + 4]) == [0, 1, 2, 3] for i in range(0, len(small), 4))
    with pytest.raises(UserError, match="0 samples"):
        debias.build(SamplerInputs([100, 0], 10, 0, debias=DebiasSampling(allow_repeats=True)))


def test_debias_refuses_a_weight_of_an_unknown_dataset():
    with pytest.raises(UserError, match="did you mean 'coco'") as error:
        debias.build(
            SamplerInputs([10, 10], 2, 0, ["coco", "sbu"], DebiasSampling(weights={"cocco": 1.0}))
        )
    assert error.value.key == "data.debias.weights.cocco"


def test_debias_finds_a_late_step_without_replaying_the_run():
    sampler = debias.build(
        SamplerInputs([3 * 10**6, 10**6, 10**5], 4, 0)
    )  # a million steps an epoch
    start = time.perf_counter()
    sampler.batch(3, sampler.steps - 1)
    assert time.perf_counter() - start < 3  # measured 0.1 s on an idle core
    start = time.perf_counter()
    for step in range(100):
        sampler.batch(4, step)
    assert time.perf_counter() - start < 3
