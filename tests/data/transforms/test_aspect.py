"""``transforms.image_aspect_ratio``: against Pillow's own padding, cropping and stretching."""

import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from engine.config.schema import Transforms
from engine.data import decode
from engine.data.transforms import pipeline
from engine.errors import UserError
from engine.types import BadSample

KEY = "transforms.train_transforms"
MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's
COLOUR = (122, 116, 104)
SIDE = 48
SHAPES = [(120, 90), (90, 120), (64, 64), (300, 7), (7, 300), (121, 90), (90, 123)]  # w, h


def photograph(width, height):
    rng = np.random.default_rng(width * height)
    coarse = rng.integers(0, 255, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def build(how, names=("resize_bicubic",), decoder="auto", size=SIDE, **sections):
    form = {"image_aspect_ratio": how, "normalize": {"mean": MEAN}, **sections}
    form.setdefault("resize_bicubic", {"size": size, "interpolation": "bicubic"})
    return pipeline.build(list(names), Transforms.model_validate(form), KEY, decoder)


def expand2square(image):
    """As LLaVA has it (llava/mm_utils.py): of an odd margin the lesser half comes first."""
    (width, height), side = image.size, max(image.size)
    square = Image.new("RGB", (side, side), COLOUR)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def expected(how, image, size=(SIDE, SIDE)):
    height, width = size
    if how == "resize":
        return image.resize((width, height), Image.Resampling.BICUBIC)
    if how == "pad":
        square = expand2square(image)
        if abs(image.width - image.height) % 2 == 0:
            padded = ImageOps.pad(image, square.size, Image.Resampling.BICUBIC, COLOUR)
            assert padded.tobytes() == square.tobytes()
        return square.resize((width, height), Image.Resampling.BICUBIC)
    scale = max(width / image.width, height / image.height)
    whole = tuple(int(scale * side + 1e-6) for side in image.size)
    whole = image.resize(whole, Image.Resampling.BICUBIC)
    left, top = round((whole.width - width) / 2), round((whole.height - height) / 2)
    return whole.crop((left, top, left + width, top + height))


def as_tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("how", ["pad", "crop", "resize"])
def test_as_pillow_does_it(how, shape):
    """Exactly by pillow_exact, within two grey levels otherwise, whatever the image comes as."""
    image = photograph(*shape)
    wanted = as_tensor(expected(how, image))
    pixels_HWC = torch.from_numpy(np.array(image))
    for given in (image, pixels_HWC.permute(2, 0, 1)):
        found = build(how)(given)
        assert found.dtype == torch.uint8 and found.shape == (3, SIDE, SIDE)
        assert (found.int() - wanted.int()).abs().max() <= 2
        assert torch.equal(build(how, decoder="pillow_exact")(given), wanted)


@pytest.mark.parametrize("size", [(24, 48), (48, 24)])
@pytest.mark.parametrize("how", ["pad", "crop", "resize"])
def test_sizes_that_are_no_square(how, size):
    image = photograph(96, 96)
    if how == "pad":
        whole = (2 * 96, 96) if size == (24, 48) else (96, 2 * 96)
        wanted = ImageOps.pad(image, whole, color=COLOUR).resize(
            size[::-1], Image.Resampling.BICUBIC
        )
    else:
        wanted = expected(how, image, size)
    found = build(how, size=size)(image)
    assert found.shape == (3, *size)
    assert (found.int() - as_tensor(wanted).int()).abs().max() <= 2


@pytest.mark.parametrize("decoder", ["auto", "pillow", "simplejpeg"])
@pytest.mark.parametrize("how", ["pad", "crop", "resize"])
def test_a_large_jpeg_is_shrunk_in_decoding(how, decoder):
    if decoder == "simplejpeg" and decode.simplejpeg is None:
        pytest.skip("simplejpeg is not installed")
    image, out = photograph(480, 320), io.BytesIO()
    image.save(out, "JPEG", quality=95)
    transform = build(how, decoder=decoder)
    assert transform.decode_size == (SIDE, SIDE)
    shrunk = decode.decode_by(
        decoder, out.getvalue(), max_pixels=10**7, target=transform.decode_size
    )
    size = shrunk.size if isinstance(shrunk, Image.Image) else tuple(shrunk.shape[:0:-1])
    assert size == (120, 80)  # the quarter: an eighth would be less than 48 high
    difference = (transform(shrunk).int() - as_tensor(expected(how, image)).int()).abs().float()
    assert difference.mean() < 2  # of a smooth image; an image shifted by a pixel differs by 4


def test_only_resizes_and_crops_are_replaced():
    names = ("color_jitter", "random_resize_crop", "center_crop", "random_flip")
    sections = {
        "color_jitter": {"p": 0.0}, "random_flip": {"p": 1.0},
        "random_resize_crop": {"size": 20}, "center_crop": {"size": SIDE},
    }  # fmt: skip
    image = photograph(120, 90)
    transform = build("pad", names, **sections)
    assert transform.size == (SIDE, SIDE) and len(transform.pieces) == 3
    assert torch.equal(transform(image), build("pad")(image).flip(-1))


def test_a_size_of_one_number_is_a_square_and_there_must_be_one():
    form = Transforms.model_validate({"image_aspect_ratio": "pad"})
    assert pipeline.output_size(["resize"], form) == (256, 256)
    with pytest.raises(UserError, match="no common size"):
        pipeline.build(["random_flip"], form, KEY)


def test_a_strip_does_not_fill_memory():
    strip = Image.new("RGB", (100_000, 1), "red")
    for decoder in ("auto", "pillow_exact"):
        found = build("pad", decoder=decoder)(strip)
        inner = (found == torch.tensor((255, 0, 0))[:, None, None]).all(0)
        assert inner.sum() == SIDE and inner.any(1).sum() == 1
    with pytest.raises(BadSample, match="too large"):
        build("crop")(strip)
