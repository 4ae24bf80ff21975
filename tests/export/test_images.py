"""Pillow's steps of an exported folder against the engine's own validation pipeline."""

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from engine.config.schema import Config, Crop, Data, Normalize, Resize, Transforms
from engine.data.decode import decode, decode_by
from engine.data.transforms import pipeline
from engine.errors import UserError
from engine.export.images import Preprocess, image_section
from engine.types import BadSample
from tests.layers.test_layers import ROOT

FLICKR = ROOT.parent / "shared" / "data" / "flickr8k" / "valid"
SIZES = [(40, 30), (30, 41), (33, 33), (17, 90), (12, 9), (24, 25)]  # height, width
SETTINGS: dict[str, dict[str, Any]] = {
    "short side, crop": {"resize": Resize(size=26), "center_crop": Crop(size=(21, 24))},
    "exact": {"valid_transforms": ["resize_bicubic", "normalize"],
              "resize_bicubic": Resize(size=(20, 31), interpolation="bicubic")},
    "crop alone, of small ones too": {"valid_transforms": ["center_crop"],
                                      "center_crop": Crop(size=27)},
    "pad": {"image_aspect_ratio": "pad", "resize": Resize(size=23), "center_crop": Crop(size=20)},
    "crop": {"image_aspect_ratio": "crop", "valid_transforms": ["resize"],
             "resize": Resize(size=(22, 19), interpolation="bicubic")},
    "squash": {"image_aspect_ratio": "resize", "valid_transforms": ["center_crop"],
               "center_crop": Crop(size=18)},
}  # fmt: skip


def configuration(**transforms: Any) -> Config:
    chosen = {"valid_transforms": ["resize", "center_crop"], **transforms}
    normalize = Normalize(mean=(0.48, 0.46, 0.41), std=(0.27, 0.26, 0.28))
    return Config(transforms=Transforms(normalize=normalize, **chosen))


def drawn(height: int, width: int) -> bytes:
    values = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(values).save(file, "PNG")
    return file.getvalue()


def engine_pixels(config: Config, image: Any, decoder: str) -> np.ndarray:
    transform = pipeline.build(
        config.transforms.valid_transforms, config.transforms, key="k", decoder=decoder
    )
    found = decode_by(transform.decoder, image, max_pixels=10**8, target=transform.decode_size)
    return transform(found).permute(1, 2, 0).numpy()


@pytest.mark.parametrize("name", SETTINGS)
def test_pixels_are_those_of_pillow_exact(name: str) -> None:
    config = configuration(**SETTINGS[name])
    preprocess = Preprocess(image_section(config))
    for size in SIZES:
        image = drawn(*size)
        pixels = preprocess.pixels(image)
        assert np.array_equal(pixels, engine_pixels(config, image, "pillow_exact")), size
        assert list(pixels.shape[:2]) == preprocess_size(config)
        assert np.array_equal(pixels, preprocess.pixels(decode(image, max_pixels=10**8)))


def preprocess_size(config: Config) -> list[int]:
    return list(image_section(config)["size"])


def test_values_are_normalised_as_the_models_do_it() -> None:
    config = configuration()
    got = Preprocess(image_section(config))([drawn(300, 260), drawn(256, 400)])
    pixels = np.stack([engine_pixels(config, drawn(*size), "pillow_exact")
                       for size in ((300, 260), (256, 400))])  # fmt: skip
    mean, std = (np.float64(getattr(config.transforms.normalize, name)) for name in ("mean", "std"))
    assert got.dtype == np.float32 and got.flags.c_contiguous
    assert np.abs(got - ((pixels / 255 - mean) / std).transpose(0, 3, 1, 2)).max() < 1e-6


@pytest.mark.skipif(not FLICKR.is_dir(), reason="there are no photographs in ../shared/data")
def test_photographs_are_within_grey_levels_of_the_default_decoder() -> None:
    config = configuration(resize=Resize(size=64), center_crop=Crop(size=56))
    preprocess = Preprocess(image_section(config))
    apart = []
    for path in sorted(FLICKR.iterdir())[:24]:
        pixels = preprocess.pixels(path)
        assert np.array_equal(pixels, engine_pixels(config, path, "pillow_exact"))
        apart.append(np.abs(pixels.astype(int) - engine_pixels(config, path, "auto")))
    assert 0 < np.mean(apart) < 3 and np.max(apart) < 64


def test_what_cannot_be_repeated_is_told() -> None:
    config = configuration(valid_transforms=["random_flip", "resize", "center_crop"])
    with pytest.raises(UserError, match="random_flip cannot be repeated") as caught:
        image_section(config)
    assert caught.value.key == "transforms.valid_transforms"


def test_bad_images_are_bad_samples() -> None:
    preprocess = Preprocess(image_section(configuration()))
    for image, told in ((b"", "empty file"), (b"no image", "not an image"), ("/no.jpg", "missing"),
                        (drawn(1, 3000), "too large")):  # fmt: skip
        with pytest.raises(BadSample, match=told):
            preprocess.pixels(image)
    small = Config(data=Data(max_image_pixels=100), transforms=configuration().transforms)
    with pytest.raises(BadSample, match="too large"):
        Preprocess(image_section(small)).pixels(drawn(11, 11))
