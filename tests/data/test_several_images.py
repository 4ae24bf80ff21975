"""Samples of several images or none: read, limited, named where bad, put together in a batch."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from engine.config.schema import Data, Transforms
from engine.data import batch_memory
from engine.data.batch_memory import allocate, stack_images, stack_several
from engine.data.loader import train_batches
from engine.data.reader import Limits, Reader, limits_of
from engine.data.samplers import shuffle
from engine.data.samplers.pool import SamplerInputs
from engine.data.transforms import pipeline
from engine.types import BadSample, Row, Sample

SIDE = 12
COUNTS = [0, 1, 2, 3, 1, 0, 1, 2]  # images of row 0, 1, …, and so on again
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


def png(value, size=(SIDE, SIDE)):
    out = io.BytesIO()
    Image.new("RGB", size, (value, 0, 0)).save(out, "PNG")
    return out.getvalue()


class Mixed:
    """Row r's images have the red values 10 r, 10 r + 1, …"""

    name, split = "mixed", "train"

    def __init__(self, length=16, counts=COUNTS, bad=()):
        self.length, self.counts, self.bad = length, counts, bad

    def __len__(self):
        return self.length

    def __getitem__(self, row):
        images = [png(10 * row + n) for n in range(self.counts[row % len(self.counts)])]
        if row in self.bad:
            images[-1] = images[-1][:30]
        return Row(f"r{row}", tuple(images), "words", "i", "c")


def reader(source, **limits):
    transform = pipeline.build(["resize"], Transforms(resize={"size": (SIDE, SIDE)}), "k")
    return Reader([source], transform, 1, Limits(text_alone=True, **limits))


def red(images):
    return [int(image[0].unique()) for image in images]


def test_all_images_are_read_in_their_order():
    found = [reader(Mixed()).read(0, 0, 0, row) for row in range(4)]
    assert [not sample.images for sample in found] == [True, False, False, False]
    assert red(found[3].images) == [30, 31, 32]
    assert len(found[1].images) == 1


def test_each_image_is_augmented_by_itself_and_repeatably():
    noisy = Transforms(random_resize_crop={"size": 8, "scale": (0.1, 0.5)})
    transform = pipeline.build(["random_resize_crop"], noisy, "k")

    class Twice(Mixed):
        def __getitem__(self, row):
            out = io.BytesIO()
            noise = np.random.default_rng(0).integers(0, 255, (20, 20, 3), np.uint8)
            Image.fromarray(noise).save(out, "PNG")
            return Row("r", (out.getvalue(), out.getvalue()), "w", "i", "c")

    one, same = (Reader([Twice()], transform, 1, Limits()).read(0, 0, 0, 0) for _ in range(2))
    assert not torch.equal(*one.images)
    assert torch.equal(one.images[1], same.images[1])


def test_one_bad_image_makes_the_sample_bad_and_is_named():
    bad = reader(Mixed(bad=(3,))).read(0, 0, 0, 3)
    assert (bad.key, bad.cause) == ("r3", "truncated") and bad.detail.startswith("image 3 of 3: ")
    alone = reader(Mixed(bad=(1,))).read(0, 0, 0, 1)
    assert "image 1 of" not in alone.detail
    large = reader(Mixed(), max_pixels=SIDE * SIDE - 1).read(0, 0, 0, 2)
    assert large.cause == "too large"


def test_more_images_than_are_allowed():
    bad = reader(Mixed(), max_images=2).read(0, 0, 0, 3)
    assert (bad.cause, bad.detail) == ("too many images", "3, data.max_images 2")
    assert isinstance(reader(Mixed(), max_images=3).read(0, 0, 0, 3), Sample)


def test_the_task_and_the_configuration_say_what_is_of_use():
    class Speaks:
        text_alone = True

        @staticmethod
        def usable(record):
            raise BadSample("no caption")

    limits = limits_of(Data(max_images=5), Speaks)
    assert limits.text_alone and limits.max_images == 5
    with pytest.raises(BadSample, match="no caption"):
        limits.check(Row("k", (), "c", "i", "c"))
    with pytest.raises(BadSample, match="no image"):
        limits_of(Data()).check(Row("k", (), "c", "i", "c"))


def batches(source, collate, workers, batch_size=8):
    transform = pipeline.build(["resize"], Transforms(resize={"size": (SIDE, SIDE)}), "k")
    sampler = shuffle.build(SamplerInputs([len(source)], batch_size, 3))
    return list(
        train_batches(
            [source], sampler, transform, collate, first_step=0, total_steps=2,
            steps_per_epoch=2, rank=0, world=1, seed=7, num_workers=workers,
            limits=Limits(text_alone=True),
        )
    )  # fmt: skip


def several(samples):
    image_BKCHW, num_images_B = stack_several(samples)
    return {
        "image_BKCHW": image_BKCHW,
        "num_images_B": num_images_B,
        "row_B": torch.tensor([sample.index for sample in samples]),
    }


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_of_any_numbers_of_images(workers, monkeypatch):
    def not_black(shape, dtype=torch.uint8):
        return allocate(shape, dtype).fill_(9)

    monkeypatch.setattr(batch_memory, "allocate", not_black)
    rows = []
    for _, batch, bad in batches(Mixed(bad=(3, 4)), several, workers):
        image_BKCHW, counts = batch["image_BKCHW"], batch["num_images_B"].tolist()
        assert image_BKCHW.shape[:2] == (len(counts), max(counts)) and len(bad) + len(counts) == 8
        assert image_BKCHW.dtype == torch.uint8
        for row, count, image_KCHW in zip(
            batch["row_B"].tolist(), counts, image_BKCHW, strict=True
        ):
            assert count == COUNTS[row % 8]
            assert red(image_KCHW[:count]) == [10 * row + n for n in range(count)]
            assert not image_KCHW[count:].any()
            rows.append(row)
    assert sorted(rows) == sorted(set(range(16)) - {3, 4})


@pytest.mark.parametrize("workers", [0, 2])
def test_images_lie_side_by_side_between_texts(workers):
    """They are not copied: neither those of rows with an image among rows without, nor pairs."""
    for _, batch, _ in batches(Mixed(counts=[0, 1, 1]), first_images, workers):
        memory = batch["image_BCHW"].untyped_storage().nbytes()
        assert memory == 8 * 3 * SIDE * SIDE and len(batch["image_BCHW"]) < 8
        assert red(batch["image_BCHW"]) == [10 * row for row in batch["row_B"].tolist()]
    for _, batch, _ in batches(Mixed(length=4, counts=[2]), several, workers, batch_size=2):
        assert batch["image_BKCHW"].shape == (2, 2, 3, SIDE, SIDE)


def first_images(samples):
    rows = [sample.index for sample in samples if sample.images]
    return {"image_BCHW": stack_images(samples), "row_B": torch.tensor(rows)}


def test_texts_alone():
    for _, batch, _ in batches(Mixed(counts=[0]), several, 0):
        assert batch["image_BKCHW"] is None and batch["num_images_B"].tolist() == [0] * 8


def test_rows_of_as_many_images_are_no_copy():
    memory_NCHW = torch.arange(6 * 3 * 4 * 5, dtype=torch.uint8).view(6, 3, 4, 5)
    samples = [Sample(Row("k"), (memory_NCHW[n], memory_NCHW[n + 1]), 0, n) for n in (0, 2, 4)]
    image_BKCHW, counts = stack_several(samples)
    assert image_BKCHW.data_ptr() == memory_NCHW.data_ptr() and counts.tolist() == [2, 2, 2]
    assert torch.equal(image_BKCHW, memory_NCHW.view(3, 2, 3, 4, 5))
    odd = Sample(Row("k"), (torch.zeros(3, 4, 1),), 0, 3)
    with pytest.raises(RuntimeError):
        stack_several([*samples, odd])
