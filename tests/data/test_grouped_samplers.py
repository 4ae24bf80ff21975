"""length_grouped and modality_grouped: exactly once, of one modality, of similar length."""

import numpy as np
import pytest
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import registry
from engine.data.loader import rank_slice
from engine.data.samplers import grouped, length_grouped, modality_grouped
from engine.data.samplers.pool import SamplerInputs, TextLengths, split_pool
from engine.errors import UserError
from tests.distributed import run

MODULES = {"length_grouped": length_grouped, "modality_grouped": modality_grouped}
# Datasets by their rows: positive lengths have an image, negative ones have none.
LENGTHS = st.lists(
    st.lists(st.integers(1, 40) | st.integers(-40, -1), min_size=1, max_size=60),
    min_size=1,
    max_size=3,
)


def make(name, lengths, batch_size, seed=0, answers=None):
    arrays = [np.array(each, np.int32) for each in lengths]
    sizes = list(map(len, lengths))
    return MODULES[name].build(
        SamplerInputs(sizes, batch_size, seed, texts=lambda: TextLengths(arrays, answers))
    )


def epoch_of(sampler, epoch=0):
    return [sampler.batch(epoch, step) for step in range(sampler.steps)]


def length_of(lengths, row):
    return lengths[row[0]][row[1]]


@pytest.mark.parametrize("name", MODULES)
def test_found_by_name(name):
    assert registry.find("data/samplers", name) is MODULES[name]
    assert "grouped" not in registry.names("data/samplers")


@pytest.mark.parametrize("name", MODULES)
@given(lengths=LENGTHS, data=st.data(), seed=st.integers(0, 99))
@settings(max_examples=80, deadline=None)
def test_exactly_once_an_epoch_over_a_resume_at_another_world(name, lengths, data, seed):
    batch_size = data.draw(st.integers(1, sum(map(len, lengths))))
    before, after = data.draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    epoch = data.draw(st.integers(0, 3))
    answers = data.draw(st.sampled_from([None, [np.abs(own) // 3 for own in lengths]]))
    sampler = make(name, lengths, batch_size, seed, answers)
    stop = data.draw(st.integers(0, sampler.steps))
    seen = []
    for step in range(sampler.steps):
        if step == stop:
            sampler = make(name, lengths, batch_size, seed, answers)
        world = before if step < stop else after
        batch = sampler.batch(epoch, step)
        assert batch.dtype == np.int64
        for rank in range(world):
            seen += [tuple(row) for row in rank_slice(batch, rank, world).tolist()]
    every = [(dataset, row) for dataset, own in enumerate(lengths) for row in range(len(own))]
    assert sorted(seen) == every


@given(lengths=LENGTHS, data=st.data())
@settings(max_examples=80, deadline=None)
def test_a_batch_is_of_one_modality_and_none_is_small(lengths, data):
    """Of both only the rows of a modality that fills not half a batch, and those in one batch."""
    batch_size = data.draw(st.integers(1, sum(map(len, lengths))))
    batches = epoch_of(make("modality_grouped", lengths, batch_size))
    counts = [
        sum(x < 0 for own in lengths for x in own),
        sum(x > 0 for own in lengths for x in own),
    ]
    signs = [{np.sign(length_of(lengths, row)) for row in batch} for batch in batches]
    assert sum(len(each) == 2 for each in signs) <= (0 < 2 * min(counts) < batch_size)
    sizes = [len(batch) for batch in batches]
    assert max(sizes) <= batch_size and min(sizes) >= batch_size // 2
    uneven = sizes.index(next((size for size in sizes if size < batch_size), sizes[-1]))
    assert len(sizes[uneven:]) <= 5 or sizes[-1] == batch_size
    assert sizes[uneven:] == sorted(sizes[uneven:], reverse=True)  # the smallest comes last


@pytest.mark.parametrize("name", MODULES)
@given(lengths=LENGTHS, data=st.data())
@settings(max_examples=30, deadline=None)
def test_a_batch_depends_on_its_place_alone(name, lengths, data):
    batch_size = data.draw(st.integers(1, sum(map(len, lengths))))
    sampler = make(name, lengths, batch_size, 5)
    places = st.tuples(st.integers(0, 5), st.integers(0, sampler.steps - 1))
    for epoch, step in data.draw(st.lists(places, min_size=1, max_size=6)):  # in any order
        fresh = make(name, lengths, batch_size, 5)
        assert np.array_equal(sampler.batch(epoch, step), fresh.batch(epoch, step))


@pytest.fixture(scope="module")
def mix():
    """Of 40,000 rows in two datasets a fifth is text alone; lengths as of a real mix."""
    rng = np.random.default_rng(0)
    drawn = [np.maximum(rng.lognormal(5, 1, size), 1).astype(int) for size in (30_000, 10_000)]
    return [drawn[0], np.where(rng.random(10_000) < 0.8, -drawn[1], drawn[1])]


@pytest.mark.parametrize("name", MODULES)
def test_padding_is_little_and_the_order_random(mix, name):
    """A row is padded to its batch's longest; by chance alone most of a batch is padding."""
    sampler = make(name, mix, 32)
    batches = [np.array([length_of(mix, row) for row in batch]) for batch in epoch_of(sampler)]
    padded = sum(len(batch) * np.abs(batch).max() for batch in batches)
    total = sum(np.abs(own).sum() for own in mix)
    by_chance = np.random.default_rng(1).permutation(np.abs(np.concatenate(mix)))
    chance = sum(32 * by_chance[i : i + 32].max() for i in range(0, len(by_chance), 32))
    assert total / padded > 0.7 and total / chance < 0.3
    # Long and short batches come in any order: neighbours are not alike.
    means = np.array([np.abs(batch).mean() for batch in batches])
    assert abs(np.corrcoef(means[1:], means[:-1])[0, 1]) < 0.1
    first, second = (sampler.batch(epoch, 0).tolist() for epoch in (0, 1))
    assert first != second != make(name, mix, 32, seed=1).batch(1, 0).tolist()


@pytest.mark.parametrize("name", MODULES)
def test_each_mega_batch_is_sorted_once_an_epoch(mix, name, monkeypatch):
    """A kind's batches come in the order of their numbers, those of a mega-batch in succession."""
    laid = []
    monkeypatch.setattr(
        grouped, "split_pool", lambda *args: laid.append(len(args[0])) or split_pool(*args)
    )
    sampler = make(name, mix, 32)
    epoch_of(sampler)
    assert sum(laid) == 40_000 and 25 <= len(laid) <= 26 + 2 * len(sampler._kinds)


@pytest.mark.parametrize("name", MODULES)
def test_questions_and_answers_are_each_of_like_length(mix, name):
    """Where they are padded apart; a batch of like sums may hold a long answer among short ones."""
    rng = np.random.default_rng(2)
    answers = [(np.abs(own) * rng.beta(0.6, 0.6, len(own))).astype(int) for own in mix]

    def taken(sampler):
        sums = 0
        for batch in epoch_of(sampler):
            long = np.array([abs(length_of(mix, row)) for row in batch])
            said = np.array([length_of(answers, row) for row in batch])
            sums += len(batch) * ((long - said).max() + said.max())
        return sums / sum(np.abs(own).sum() for own in mix)

    by_sum, by_both = (taken(make(name, mix, 32, answers=given)) for given in (None, answers))
    assert by_both < 0.85 * by_sum
    # where answers are alike, questions decide, and the other way round
    for share in (0, 1):
        answers = [np.abs(own) * share for own in mix]
        assert taken(make(name, mix, 32, answers=answers)) == pytest.approx(
            taken(make(name, mix, 32)), rel=0.05
        )


def test_modalities_are_mixed_evenly_and_at_random(mix):
    batches = epoch_of(make("modality_grouped", mix, 32))
    rows = {tuple(row) for batch in batches for row in batch.tolist()}
    assert len(rows) == sum(map(len, batches)) == 40_000  # over many blocks and mega-batches too
    alone = np.array([length_of(mix, batch[0]) < 0 for batch in batches])
    share = alone.mean()
    assert share == pytest.approx(0.2, abs=0.01)
    for start in range(0, len(alone) - 64, 64):
        assert alone[start : start + 64].sum() == pytest.approx(64 * share, abs=2)
    assert (alone[1:] & alone[:-1]).mean() == pytest.approx(share**2, abs=0.02)


def test_length_grouped_knows_no_modality(mix):
    batches = epoch_of(make("length_grouped", mix, 32))
    both = [len({length_of(mix, row) < 0 for row in batch}) == 2 for batch in batches]
    assert np.mean(both) > 0.95


@pytest.mark.parametrize("absent", [1, -1])
def test_a_modality_may_be_absent(absent):
    batches = epoch_of(make("modality_grouped", [[absent * n for n in range(1, 30)]], 8))
    assert [len(batch) for batch in batches] == [8, 8, 7, 6]


@pytest.mark.parametrize(
    ("texts", "sizes", "mixed"),
    [
        (0, [16, 16, 16], 0),
        (3, [16, 13, 13, 9], 1),  # in a batch with 6 images; the other 42 as they come out
        (7, [16, 14, 14, 11], 1),
        (8, [16, 16, 16, 8], 0),  # half a batch is a batch
        (20, [16, 16, 16, 10, 10], 0),
    ],
)
def test_rows_of_a_modality_that_fill_no_batch(texts, sizes, mixed):
    lengths = [[*range(1, 49), *range(-texts, 0)]]
    sampler = make("modality_grouped", lengths, 16)
    found = []
    for epoch in range(3):
        batches = epoch_of(sampler, epoch)
        both = [b for b in batches if len({length_of(lengths, row) < 0 for row in b}) == 2]
        assert len(both) == mixed
        found += [sorted(row[1] for row in b.tolist() if row[1] < 48) for b in both]
    assert len(found) < 2 or found[0] != found[1]  # other images in every epoch
    if texts:
        assert sorted(map(len, batches), reverse=True) == sorted(sizes, reverse=True)


def test_less_than_a_batch_and_a_step_outside_the_epoch():
    for name in MODULES:
        with pytest.raises(UserError, match="has 30 samples") as error:
            make(name, [[1] * 10, [-1] * 20], 32)
        assert error.value.key == "data.batch_size"
        sampler = make(name, [[1] * 20], 10)
        with pytest.raises(IndexError):
            sampler.batch(0, sampler.steps)


def test_memory_is_that_of_the_lengths(mix):
    import tracemalloc

    rows = 2_000_000
    lengths = [np.resize(np.concatenate(mix), rows).astype(np.int32), np.ones(rows, np.int32)]
    tracemalloc.start()
    sampler = MODULES["modality_grouped"].build(
        SamplerInputs([rows, rows], 256, 0, texts=lambda: TextLengths(lengths))
    )
    for step in range(0, sampler.steps, 1000):
        sampler.batch(0, step)
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert held < 4 * rows + 2_000_000  # of the mixed dataset each row's place, of the other none


def test_a_resume_knows_other_lengths():
    one, same, other = (
        make("length_grouped", [own], 2) for own in ([1, 2, 3], [1, 2, 3], [1, 2, 4])
    )
    assert one.lengths_digest == same.lengths_digest != other.lengths_digest
    answered = make("length_grouped", [[1, 2, 3]], 2, answers=[np.array([1, 1, 1])])
    assert answered.lengths_digest != one.lengths_digest


def batches_of_this_rank(lengths):
    """What each process would read, gathered: [rank][step]."""
    sampler = make("modality_grouped", lengths, 8, seed=3)
    rank, world = dist.get_rank(), dist.get_world_size()
    own = [rank_slice(batch, rank, world).tolist() for batch in epoch_of(sampler, 1)]
    gathered = [None] * world
    dist.all_gather_object(gathered, own)
    return gathered


def test_two_processes_agree():
    rng = np.random.default_rng(0)
    lengths = [(rng.integers(1, 50, 70) * rng.choice([-1, 1], 70)).tolist(), [5] * 21]
    first, second = run(batches_of_this_rank, 2, lengths)
    assert first == second
    together = [[tuple(row) for row in one + two] for one, two in zip(*first, strict=True)]
    assert sorted(row for batch in together for row in batch) == [
        (d, row) for d in range(2) for row in range(len(lengths[d]))
    ]
    assert all(len({length_of(lengths, row) < 0 for row in batch}) == 1 for batch in together)
