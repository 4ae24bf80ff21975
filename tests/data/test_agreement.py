"""Processes agree on debiased batches without a word between them."""

import random

import numpy as np
import pytest
import torch
import torch.distributed as dist

from engine.data.loader import train_batches
from engine.data.samplers import debias
from engine.data.samplers.pool import SamplerInputs
from tests.data.drawn_source import Drawn, collate, noisy
from tests.distributed import run

SIZES = {"one": 90, "two": 50, "three": 23}
BATCH_SIZE = 8
STEPS = 200


def rows_by_rank(first, end):
    """What this process loads in steps ``first`` to ``end``, and so do all others: [step][rank]."""
    rank, world = dist.get_rank(), dist.get_world_size()
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(1000 * world + rank)  # agreement may hang on none of these
    sampler = debias.build(SamplerInputs(list(SIZES.values()), BATCH_SIZE, 11, names=list(SIZES)))
    batches = train_batches(
        [Drawn(name, size) for name, size in SIZES.items()], sampler, noisy, collate,
        first_step=first, total_steps=end, steps_per_epoch=sampler.steps, rank=rank,
        world=world, seed=11, num_workers=0,
    )  # fmt: skip
    own = [batch["row_B2"].tolist() for _, batch, _ in batches]
    gathered = [None] * world
    dist.all_gather_object(gathered, own)
    return list(zip(*gathered, strict=True))


def global_batches(steps):
    return [[tuple(row) for rows in ranks for row in rows] for ranks in steps]


def assert_one_dataset_a_step_and_each_row_once_a_pass(batches):
    shown = {dataset: [] for dataset in range(len(SIZES))}
    for batch in batches:
        (dataset,) = {dataset for dataset, _ in batch}
        assert len(batch) == BATCH_SIZE
        shown[dataset] += [row for _, row in batch]
    for dataset, size in enumerate(SIZES.values()):
        rows = shown[dataset]
        assert len(rows) > 5 * size
        for start in range(0, len(rows), size):
            one_pass = rows[start : start + size]
            assert len(set(one_pass)) == len(one_pass)
            assert len(one_pass) < size or sorted(one_pass) == list(range(size))


@pytest.fixture(scope="module")
def four():
    """What each of four processes says that all of them load."""
    return run(rows_by_rank, 4, 0, STEPS)


def test_four_processes_name_the_same_dataset_at_every_step(four):
    assert four[0] == four[1] == four[2] == four[3]
    assert len(four[0]) == STEPS
    for ranks in four[0]:
        assert len({dataset for rows in ranks for dataset, _ in rows}) == 1
        assert [len(rows) for rows in ranks] == [2, 2, 2, 2]
    assert_one_dataset_a_step_and_each_row_once_a_pass(global_batches(four[0]))


def test_a_resume_on_other_numbers_of_processes_continues_the_order(four):
    whole = global_batches(four[0])
    resumed = whole[:61]
    for world, first, end in ((3, 61, 130), (2, 130, STEPS)):
        resumed += global_batches(run(rows_by_rank, world, first, end)[0])
    assert resumed == whole
    assert_one_dataset_a_step_and_each_row_once_a_pass(resumed)
