"""One row → a sample or the reason why not."""

from dataclasses import replace
from pathlib import Path

import torch

from engine.data.bad_samples import BadRecord
from engine.data.reader import Limits, Reader
from engine.types import Row, Sample
from tests.data.drawn_source import Drawn, noisy

BOUND = 10**8


class TextOnly(Drawn):
    def __getitem__(self, index):
        return Row("t", (), "words", "i", "c", label=4)


class Missing(Drawn):
    def __getitem__(self, index):
        return Row("gone.jpg", (Path("/nonexistent/gone.jpg"),), "words", "i", "c")


def test_a_sample_carries_all_of_its_record():
    sample = Reader([Drawn("a", 5), Drawn("b", 5)], noisy, 1, Limits(BOUND)).read(0, 0, 1, 3)
    assert isinstance(sample, Sample)
    assert (sample.row.caption, sample.row.image_id, sample.row.caption_id) == ("row 3", "3", "3c")
    assert (sample.dataset, sample.index, sample.row.label) == (1, 3, None)
    assert sample.images[0].shape == (3, 16, 20)


def test_a_row_without_an_image_is_of_use_only_where_that_is_said():
    sample = Reader([TextOnly("a", 5)], noisy, 1, Limits(text_alone=True)).read(0, 0, 0, 0)
    assert sample.images == ()
    assert sample.row.label == 4
    bad = Reader([TextOnly("a", 5)], noisy, 1, Limits()).read(0, 0, 0, 0)
    assert (bad.key, bad.cause) == ("t", "no image")


class Talk(Drawn):
    def __getitem__(self, index):
        turns = (("human", "x" * 30), ("gpt", "y"))
        return replace(super().__getitem__(index), turns=turns if index else ())


def test_a_text_beyond_the_limit_is_named():
    reader = Reader([Talk("a", 5)], noisy, 1, Limits(max_caption_chars=20))
    assert isinstance(reader.read(0, 0, 0, 0), Sample)
    bad = reader.read(0, 0, 0, 1)
    assert (bad.cause, bad.detail) == (
        "caption too long",
        "30 characters, data.max_caption_chars 20",
    )


def test_a_missing_file_is_named():
    bad = Reader([Missing("a", 5)], noisy, 1, Limits(BOUND)).read(7, 0, 0, 2)
    assert bad == BadRecord(7, "a", 2, "gone.jpg", "missing", "/nonexistent/gone.jpg")


def test_the_bound_on_pixels_holds():
    bad = Reader([Drawn("a", 5)], noisy, 1, Limits(100)).read(0, 0, 0, 0)
    assert bad.cause == "too large"


def test_seeds_fit_any_generator_and_hang_on_the_place():
    reader = Reader([Drawn("a", 50)], noisy, 1, Limits(BOUND))
    seeds = [reader.read(step, 0, 0, row).seed for step, row in ((0, 1), (5, 1), (0, 2))]
    assert seeds[0] == seeds[1] != seeds[2]
    assert all(0 <= reader.read(0, epoch, 0, 0).seed < 2**63 for epoch in range(20))


def test_without_a_seed_random_transforms_repeat():
    reader = Reader([Drawn("a", 5)], noisy, None, Limits(BOUND))
    once, again = reader.read(0, 0, 0, 1), reader.read(3, 0, 0, 1)
    assert once.seed is None
    assert torch.equal(once.images[0], again.images[0])
