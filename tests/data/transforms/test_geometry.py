"""The resize: torch's own, cropped early, near Pillow's."""

import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from engine.config.schema import Transforms
from engine.data.decode import decode_by
from engine.data.transforms import pipeline
from engine.data.transforms.geometry import resample

SIZES = [(37, 50), (90, 64), (64, 120), (200, 200), (90, 120), (8, 119), (91, 119), (1, 1)]


def photograph(width=120, height=90, channels=3):
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 255, (9, 12, 4), dtype=np.uint8))
    pixels = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))
    return torch.from_numpy(pixels[..., :channels].copy()).permute(2, 0, 1)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("channels", [3, 4])
def test_pixels_are_torchs(size, interpolation, channels):
    image = photograph(channels=channels)
    out = resample(image, size, interpolation)
    whole = F.interpolate(image[None], size, mode=interpolation, antialias=True)
    assert torch.equal(out, whole[0])
    assert out.permute(1, 2, 0).is_contiguous()


@pytest.mark.parametrize("size", SIZES)
def test_a_crop_is_that_of_the_whole(size):
    image, (height, width) = photograph(), size
    whole = resample(image, size, "bicubic")
    drawn = np.random.default_rng(1)
    for _ in range(20):
        h, w = drawn.integers(1, height + 1), drawn.integers(1, width + 1)
        top, left = drawn.integers(0, height - h + 1), drawn.integers(0, width - w + 1)
        box = tuple(int(x) for x in (top, left, h, w))
        cropped = resample(image, size, "bicubic", box)
        assert torch.equal(cropped, whole[:, top : top + h, left : left + w])


def test_a_crop_as_long_as_the_image_was():
    image = photograph(40, 30)
    whole = resample(image, (60, 80), "bicubic")
    box = (0, 0, 30, 40)  # the kernel would take that for nothing to do
    assert torch.equal(resample(image, (60, 80), "bicubic", box), whole[:, :30, :40])


def test_memory_of_any_order_is_read():
    image = photograph()
    expected = resample(image, (40, 40), "bicubic")
    for other in (image.contiguous(), image.flip(-1).flip(-1), image.repeat(1, 2, 2)[:, :90, :120]):
        assert torch.equal(resample(other, (40, 40), "bicubic"), expected)


@pytest.mark.parametrize("size", [(512, 342), (342, 512), (300, 300), (1000, 250), (224, 224)])
def test_evaluations_pixels_are_pillows_but_for_a_fraction_of_a_level(size):
    """The bound that the documentation gives is 1 grey level on average."""
    rng = np.random.default_rng(3)
    grain = rng.normal(0, 12, (size[1], size[0], 3))
    smooth = photograph(*size).permute(1, 2, 0).numpy()
    pixels = np.clip(smooth + grain, 0, 255).astype(np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=90)
    sections = {"resize_bicubic": {"size": 224, "interpolation": "bicubic"}}
    config, names = Transforms.model_validate(sections), ["resize_bicubic", "center_crop"]
    found = {}
    for decoder in ("auto", "pillow", "pillow_exact"):
        transform = pipeline.build(names, config, "transforms", decoder)
        target = transform.decode_size
        if decoder == "auto":
            target = None  # shrinking in decoding is another thing
        image = decode_by(decoder, out.getvalue(), max_pixels=10**7, target=target)
        found[decoder] = transform(image)
    assert torch.equal(found["pillow_exact"], plain_pillow(out.getvalue()))
    difference = (found["auto"].int() - found["pillow_exact"].int()).abs().float()
    assert difference.mean() <= 0.05 and difference.max() <= 2


def plain_pillow(data):
    """As open_clip's transform for evaluation, before its floats: resize and crop by Pillow."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    short = min(image.size)
    size = tuple(224 * side // short for side in image.size)
    image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = (round((side - 224) / 2) for side in size)
    return torch.from_numpy(np.array(image.crop((left, top, left + 224, top + 224)))).permute(
        2, 0, 1
    )
