"""Samplers hold nothing that grows with the data: ten thousand rows or a thousand million."""

import time
import tracemalloc

import pytest

from engine import registry
from engine.data.permutation import Permutation
from engine.data.samplers.pool import SamplerInputs
from engine.data.views import Concatenated, Draw, Repeated, Subset, origin

SAMPLERS = ("shuffle", "sequential", "debias")
FEW, MANY = (6_000, 4_000), (600_000_000, 400_000_000)
BATCH_SIZE = 256
STEPS = 30


def build(name, sizes):
    module = registry.find("data/samplers", name)
    return module.build(SamplerInputs(list(sizes), BATCH_SIZE, 3, names=["one", "two"]))


def traced(work):
    """Bytes held after ``work()`` by what it returned, and at most meanwhile."""
    work()  # what is imported or cached at first is no part of it
    tracemalloc.start()
    kept = work()
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    del kept
    return held, peak


def seconds(work, tries=7):
    """The least of some tries: other processes only add."""
    found = []
    for _ in range(tries):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return min(found)


@pytest.mark.parametrize("name", SAMPLERS)
def test_memory_of_an_epoch_does_not_grow(name):
    def work(sizes):
        sampler = build(name, sizes)
        for step in range(STEPS):
            sampler.batch(0, step)
        return sampler

    few, many = traced(lambda: work(FEW)), traced(lambda: work(MANY))
    assert many[0] <= 1.25 * few[0] + 2_000
    assert many[1] <= 1.25 * few[1] + 2_000
    assert many[1] < 200_000


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_resume_deep_in_a_run_takes_bounded_memory(name):
    sampler = build(name, MANY)
    late = sampler.steps - 1
    assert late > 3_900_000 - 1

    def work():
        fresh = build(name, MANY)
        fresh.batch(2, late)
        return fresh

    held, peak = traced(work)
    assert held < 20_000
    assert peak < 16_000_000  # one int64 a step of the epoch would be 31 MB, one a row 8 GB


@pytest.mark.parametrize("name", SAMPLERS)
def test_time_of_a_batch_does_not_grow(name):
    few, many = build(name, FEW), build(name, MANY)

    def epoch(sampler):
        for step in range(STEPS):
            sampler.batch(1, step)

    for sampler in (few, many):
        sampler.batch(1, 0)  # finds its place once
    assert seconds(lambda: epoch(many)) <= 3 * seconds(lambda: epoch(few))  # measured: 0.8 to 1.3


@pytest.mark.parametrize("name", SAMPLERS)
def test_rows_of_a_thousand_million_are_all_in_reach(name):
    sampler = build(name, MANY)
    for epoch, step in ((0, 0), (0, 7), (1, sampler.steps - 1)):
        batch = sampler.batch(epoch, step)
        assert len({tuple(row) for row in batch.tolist()}) == len(batch)
        for dataset, size in enumerate(MANY):
            rows = batch[batch[:, 0] == dataset, 1]
            assert ((rows >= 0) & (rows < size)).all()


def test_memory_of_a_sampler_of_shards_grows_with_the_shards_alone():
    def work(size):
        blocks = [[size // 100] * 100]
        sampler = registry.find("data/samplers", "shards").build(
            SamplerInputs([size], BATCH_SIZE, 3, window=4, blocks=lambda: blocks)
        )
        for step in range(STEPS):
            sampler.batch(0, step)
        return sampler

    few, many = traced(lambda: work(10**4)), traced(lambda: work(10**9))
    assert many[0] <= few[0] + 2_000
    assert many[1] <= few[1] + 2_000


class Long:
    """A dataset of any length without content."""

    split, classes = "train", None

    def __init__(self, length):
        self.name, self.length = str(length), length

    def __len__(self):
        return self.length


def test_memory_of_views_does_not_grow():
    def work(length):
        parts = Concatenated("both", [Long(length), Long(2 * length)])
        view = Repeated(Subset(parts, length // 3, 0), 3)
        for row in range(0, len(view), len(view) // 20):
            origin(view, row, Draw(0, 5))
        return view

    few, many = traced(lambda: work(10**4)), traced(lambda: work(10**9))
    assert many[0] <= few[0] + 1_000
    assert many[1] <= few[1] + 1_000


def test_a_row_of_a_permutation_is_found_as_fast():
    few, many = Permutation(10**4, 1), Permutation(10**9, 1)

    def rows(order):
        for position in range(500):
            order.at(position)

    assert seconds(lambda: rows(many)) <= 3 * seconds(lambda: rows(few))
