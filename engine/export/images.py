"""An image as an exported encoder takes it: a run's pipeline as data, and by Pillow and NumPy.

The steps are those of the engine's validation pipeline with ``data.decoder: pillow_exact``, pixel
for pixel. The engine's default decoder resizes by torch's kernel, from a JPEG decoded at a smaller
scale where that suffices, and differs by grey levels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from engine.data.decode import decode
from engine.errors import UserError
from engine.types import BadSample

if TYPE_CHECKING:  # pydantic, which the runner does without
    from engine.config.schema import Config

Size = tuple[int, int]
Step = Mapping[str, Any]

# Bounds of the engine's pipeline: a thin strip, resized or made square, would fill memory.
_MAX_RESIZED_PIXELS = 1 << 24
_MAX_PADDED_PIXELS = 1 << 26
_PILLOWS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


class Preprocess:
    """Images → normalised ``image_BCHW``, by a manifest's section ``image``."""

    def __init__(self, section: Mapping[str, Any]) -> None:
        self.steps: Sequence[Step] = section["steps"]
        self.max_pixels = int(section["max_pixels"])
        # in units of uint8, and rounded as the engine's models hold them
        self.mean_C11, self.std_C11 = (
            np.float32(255) * np.array(section[name], np.float32)[:, None, None]
            for name in ("mean", "std")
        )

    def __call__(self, images: Sequence[Any]) -> np.ndarray:
        """float32 [B, C, H, W] of paths, encoded bytes or Pillow images. Raises BadSample."""
        return self.normalised([self.pixels(image) for image in images])

    def normalised(self, pixels: Sequence[np.ndarray]) -> np.ndarray:
        """float32 [B, C, H, W] of what ``pixels`` gave."""
        image_BCHW = np.ascontiguousarray(np.stack(pixels).transpose(0, 3, 1, 2), np.float32)
        return (image_BCHW - self.mean_C11) / self.std_C11

    def pixels(self, image: str | Path | bytes | Image.Image) -> np.ndarray:
        """uint8 [H, W, C] of one image. Raises BadSample."""
        if isinstance(image, Image.Image):
            current = image.convert("RGB")
        else:
            place = Path(image) if isinstance(image, str) else image
            current = decode(place, max_pixels=self.max_pixels)
        for step in self.steps:
            current = _STEPS[step["step"]](current, step)
        return np.asarray(current)


def _resize(image: Image.Image, step: Step) -> Image.Image:
    size, (width, height) = step["size"], image.size
    if isinstance(size, int):  # by the shorter side
        long = size * max(height, width) // min(height, width)
        size = (size, long) if height <= width else (long, size)
    return _resized(image, size, step)


def _resized(image: Image.Image, size: Size, step: Step) -> Image.Image:
    if size[0] * size[1] > _MAX_RESIZED_PIXELS:
        raise BadSample(
            "too large", f"{image.width}×{image.height} pixels resized by the shorter side"
        )
    return image.resize((size[1], size[0]), _PILLOWS[step["interpolation"]])


def _center_crop(image: Image.Image, step: Step) -> Image.Image:
    """The middle, rounded as torchvision rounds it; with black margins where it is too small."""
    (down, across), (width, height) = step["size"], image.size
    if height < down or width < across:
        whole = max(height, down), max(width, across)
        place = max(0, across - width) // 2, max(0, down - height) // 2
        image = _pasted(image, whole, place, (0, 0, 0))
    top, left = round((image.height - down) / 2), round((image.width - across) / 2)
    return image.crop((left, top, left + across, top + down))


def _pasted(image: Image.Image, size: Size, place: Size, colour: Sequence[int]) -> Image.Image:
    canvas = Image.new("RGB", (size[1], size[0]), tuple(colour))
    canvas.paste(image, place)
    return canvas


def _fit(image: Image.Image, step: Step) -> Image.Image:
    """``transforms.image_aspect_ratio``: padded, cropped or stretched to the size."""
    (down, across), (width, height) = step["size"], image.size
    if step["how"] == "resize":
        return _resized(image, (down, across), step)
    lying = height * across <= width * down  # wider than what is wanted
    if step["how"] == "crop":
        size = (down, width * down // height) if lying else (height * across // width, across)
        return _center_crop(_resized(image, size, step), step)
    whole = (-(-width * down // across), width) if lying else (height, -(-height * across // down))
    if whole[0] * whole[1] > _MAX_PADDED_PIXELS:  # resized before: at the edges a little else
        inner = round(height * down / whole[0]), round(width * across / whole[1])
        image = _resized(image, (max(1, inner[0]), max(1, inner[1])), step)
        whole = down, across
    place = (whole[1] - image.width) // 2, (whole[0] - image.height) // 2
    return _resized(_pasted(image, whole, place, step["colour"]), (down, across), step)


_STEPS = {"resize": _resize, "center_crop": _center_crop, "fit": _fit}


# --- a run's pipeline as data

_KEY = "transforms.valid_transforms"
_SIZED = ("resize", "resize_bicubic", "center_crop")


def image_section(config: Config) -> dict[str, Any]:
    """A run's validation pipeline as data: steps, sizes and normalisation.

    Raises UserError for a transform that ``Preprocess`` does not have.
    """
    from engine.data.transforms.pipeline import fit_interpolation, output_size  # with torch

    transforms = config.transforms
    names = [name for name in transforms.valid_transforms if name != "normalize"]
    for name in names:
        if name not in _SIZED:
            raise UserError(
                f"{name} cannot be repeated where the engine is not; let the list hold "
                f"{', '.join(_SIZED)} alone",
                key=_KEY,
            )
    size = output_size(names, transforms, _KEY)
    mean, std = list(transforms.normalize.mean), list(transforms.normalize.std)
    if transforms.image_aspect_ratio is not None:
        steps = [{
            "step": "fit", "how": transforms.image_aspect_ratio, "size": list(size),
            "interpolation": fit_interpolation(names, transforms),
            "colour": [int(255 * value) for value in mean],
        }]  # fmt: skip
    else:
        steps = [_step(name, getattr(transforms, name)) for name in names]
    return {
        "size": list(size), "steps": steps, "mean": mean, "std": std,
        "max_pixels": config.data.max_image_pixels,
    }  # fmt: skip


def _step(name: str, section: Any) -> dict[str, Any]:
    size = section.size if isinstance(section.size, int) else list(section.size)
    if name == "center_crop":
        return {"step": name, "size": [size, size] if isinstance(size, int) else size}
    return {"step": "resize", "size": size, "interpolation": section.interpolation}
