"""A batch's memory: written once, shared with the trainer, the same for any number of workers."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from engine.config.schema import Transforms
from engine.data import batch_memory, loader
from engine.data.batch_memory import allocate, allocate_images, stack_images
from engine.data.samplers import shuffle
from engine.data.samplers.pool import SamplerInputs
from engine.data.transforms import pipeline
from engine.errors import FaultError
from engine.types import Row, Sample


def sample(image, index=0):
    return Sample(Row("k"), () if image is None else (image,), 0, index)


class Photographs:
    """JPEGs of many sizes and orientations; every ninth is cut short, every seventh missing."""

    name, split = "photographs", "train"

    def __len__(self):
        return 40

    def __getitem__(self, index):
        rng = np.random.default_rng(index)
        size = tuple(int(side) for side in rng.integers(20, 90, 2))
        coarse = Image.fromarray(rng.integers(0, 255, (5, 5, 3), dtype=np.uint8))
        exif, out = Image.Exif(), io.BytesIO()
        exif[0x0112] = 1 + index % 8
        form = "PNG" if index % 5 == 4 else "JPEG"
        coarse.resize(size, Image.Resampling.BICUBIC).save(out, form, exif=exif)
        data = out.getvalue()
        if index % 9 == 8:
            data = data[: len(data) // 2]
        image = Path("/nonexistent/image.jpg") if index % 7 == 6 else data
        return Row(f"{index}", (image,), "words", f"{index}", f"{index}")


def collate(samples):
    return {
        "image_BCHW": stack_images(samples),
        "index_B": torch.tensor([sample.index for sample in samples]),
    }


def batches(num_workers, decoder="auto", names=("random_resize_crop", "random_flip"), **options):
    transform = pipeline.build(
        list(names), Transforms.model_validate({"random_resize_crop": {"size": 24}}), "k", decoder
    )
    sampler = shuffle.build(SamplerInputs([40], 8, 3))
    return list(
        loader.train_batches(
            [Photographs()], sampler, transform, collate, first_step=0, total_steps=8,
            steps_per_epoch=4, rank=0, world=1, seed=7, num_workers=num_workers, **options,
        )
    )  # fmt: skip


def test_augmentation_hangs_on_seed_epoch_and_row_alone():
    runs = [batches(0), batches(1), batches(2), batches(0, "pillow")]
    seen: dict[int, list[torch.Tensor]] = {}
    for steps in zip(*runs, strict=True):
        for _, batch, bad in steps[1:]:
            assert torch.equal(batch["image_BCHW"], steps[0][1]["image_BCHW"])
            assert torch.equal(batch["index_B"], steps[0][1]["index_B"])
            assert bad == steps[0][2]
        for image, index in zip(*steps[0][1].values(), strict=True):
            seen.setdefault(int(index), []).append(image)
    twice = [images for images in seen.values() if len(images) == 2]
    assert twice and all(not torch.equal(one, other) for one, other in twice)  # two epochs


def test_images_are_written_to_their_place():
    for _, batch, bad in batches(0):
        image_BCHW = batch["image_BCHW"]
        assert image_BCHW.is_contiguous(memory_format=torch.channels_last)
        assert len(image_BCHW) == 8 - len(bad)
        assert image_BCHW.untyped_storage().nbytes() == 8 * 3 * 24 * 24  # bad ones leave no hole
    assert any(bad for _, _, bad in batches(0))


def test_workers_share_what_they_write(monkeypatch):
    shared = []
    monkeypatch.setattr(batch_memory, "get_worker_info", lambda: True)
    made = allocate_images(4, (8, 6))
    assert made.is_shared() and made.shape == (4, 3, 8, 6) and made.dtype == torch.uint8
    for i in range(3):
        made[i] = i
        shared.append(sample(made[i], i))
    stacked = stack_images(shared)
    assert stacked.data_ptr() == made.data_ptr()
    assert stacked.is_shared()
    assert [int(image.unique()) for image in stacked] == [0, 1, 2]


def test_a_large_batch_in_this_process():
    for number in (27, 28, 64):  # about the size from which on pages are large
        made = allocate_images(number, (224, 224))
        assert made.is_contiguous(memory_format=torch.channels_last)
        made.fill_(7)
        assert int(made.sum()) == 7 * number * 3 * 224 * 224
        for images in (made, made.contiguous()):
            stacked = stack_images([sample(image) for image in images])
            assert stacked.data_ptr() == images.data_ptr()
            assert stacked.shape == images.shape and stacked.stride() == images.stride()


def test_memory_of_either_order_is_written_to():
    """From Pillow's four channels, a decoder's three, and planes."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 40, 3), np.uint8))
    transform = pipeline.build(
        ["resize", "center_crop"],
        Transforms.model_validate({"resize": {"size": 28}, "center_crop": {"size": 24}}),
        "k",
    )
    pixels_HWC = torch.from_numpy(np.array(image))
    for form in (image, pixels_HWC.permute(2, 0, 1), pixels_HWC.permute(2, 0, 1).contiguous()):
        expected = transform(form)
        for out in (torch.empty_like(expected), allocate_images(1, (24, 24))[0]):
            assert transform(form, out) is out
            assert torch.equal(out, expected)
            assert torch.equal(expected, transform(image))


def test_other_images_are_stacked():
    loose = [torch.full((3, 4, 5), i, dtype=torch.uint8) for i in range(3)]
    memory = torch.arange(24, dtype=torch.uint8).view(2, 3, 2, 2)
    cases = [
        loose,
        [memory[1], memory[0]],
        [memory[0], memory[0]],
        [image.permute(0, 2, 1) for image in loose],
        [torch.rand(3, 2, 2) for _ in range(2)],
    ]
    for images in cases:
        found = stack_images([sample(image) for image in images])
        assert torch.equal(found, torch.stack(images))
        assert found.is_contiguous()
    with_texts = [sample(loose[0]), sample(None), sample(loose[2])]
    assert torch.equal(stack_images(with_texts), torch.stack([loose[0], loose[2]]))
    with pytest.raises(RuntimeError):
        stack_images([sample(torch.zeros(3, 4, 5)), sample(torch.zeros(3, 4, 4))])


def test_a_transform_that_puts_out_something_else_than_foretold(monkeypatch, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "floats.py").write_text(
        "def build(config):\n    return lambda image_CHW: image_CHW.float() / 255\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for _, batch, _ in batches(0, names=("random_resize_crop", "mine.floats")):
        assert batch["image_BCHW"].dtype == torch.float32
        assert float(batch["image_BCHW"].max()) <= 1.0


def test_shared_memory_that_ran_out_is_named(monkeypatch):
    def full(num_bytes):
        raise RuntimeError("unable to allocate shared memory(shm): No space left on device")

    monkeypatch.setattr(batch_memory, "get_worker_info", lambda: True)
    monkeypatch.setattr(torch.UntypedStorage, "_new_shared", full)
    with pytest.raises(FaultError, match=r"/dev/shm.*data\.num_workers"):
        allocate((512, 3, 224, 224))
