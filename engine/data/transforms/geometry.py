"""Resizing, cropping and mirroring in uint8.

Resizing dominates a naive loader. Here torch's native kernel does it, on the memory that the image
was decoded into: antialiased, within two grey levels of Pillow's own, several times its speed.
Where ``exact`` is asked for, Pillow does it.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from engine.config import schema
from engine.data.transforms.memory import pillow_memory
from engine.data.transforms.resampling import Box, Size, resample
from engine.types import BadSample

_PILLOWS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
MAX_RESIZED_PIXELS = 1 << 24  # a 1 × 100,000 strip resized by its shorter side would fill memory


def pair(size: int | Size) -> Size:
    """(height, width) of a size that may be one number for both."""
    return size if isinstance(size, tuple) else (size, size)


def height_width(image: Image.Image | Tensor) -> Size:
    """Of a decoded image of either form."""
    if isinstance(image, Image.Image):
        return image.height, image.width
    return image.shape[-2], image.shape[-1]


def to_tensor(image: Image.Image | Tensor) -> Tensor:
    """uint8 CHW; the memory stays HWC, which is the order that the resize kernel wants."""
    if isinstance(image, Tensor):
        return image
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def resize(
    image: Image.Image | Tensor,
    size: Size,
    interpolation: str,
    box: Box | None = None,
    crop: Box | None = None,
) -> Tensor:
    """Antialiased resize of a box (top, left, height, width) to exactly ``size`` (height, width),
    and of that only the box ``crop``."""
    image_CHW = pillow_memory(image) if isinstance(image, Image.Image) else image
    if box is not None:
        top, left, height, width = box
        image_CHW = image_CHW[:, top : top + height, left : left + width]
    image_CHW = resample(image_CHW, size, interpolation, crop)
    return image_CHW if len(image_CHW) == 3 else image_CHW[:3]


def resize_exactly(
    image: Image.Image | Tensor, size: Size, interpolation: str, box: Box | None = None
) -> Image.Image:
    """``resize``, bit for bit as Pillow does it."""
    if isinstance(image, Tensor):
        image = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    if box is not None:
        top, left, height, width = box
        image = image.crop((left, top, left + width, top + height))
    return image.resize(size[::-1], _PILLOWS[interpolation])


def middle(size: Size, crop: Size) -> Box:
    """The box of a crop about the middle of an image, rounded as torchvision's center_crop."""
    return round((size[0] - crop[0]) / 2), round((size[1] - crop[1]) / 2), *crop


class Resize:
    """To (height, width) exactly, or by the shorter side to an int; then cropped about the middle,
    where ``crop`` says how large."""

    def __init__(
        self, config: schema.Resize, *, exact: bool = False, crop: Size | None = None
    ) -> None:
        self.config, self.exact, self.crop = config, exact, crop

    def __call__(self, image: Image.Image | Tensor) -> Image.Image | Tensor:
        size = self._size(*height_width(image))
        if self.exact:
            return resize_exactly(image, size, self.config.interpolation)
        return resize(image, size, self.config.interpolation, crop=self._middle(size))

    def _size(self, height: int, width: int) -> Size:
        if isinstance(self.config.size, tuple):
            return self.config.size
        short = self.config.size
        long = short * max(height, width) // min(height, width)
        if long * short > MAX_RESIZED_PIXELS:
            raise BadSample("too large", f"{width}×{height} pixels resized by the shorter side")
        return (short, long) if height <= width else (long, short)

    def _middle(self, size: Size) -> Box | None:
        return None if self.crop is None else middle(size, self.crop)

    def covers(self, crop: Size) -> bool:
        """Whether this puts out whole images, and a crop of that size lies inside each."""
        sides = zip(pair(self.config.size), crop, strict=True)
        return self.crop is None and all(have >= keep for have, keep in sides)


class RandomResizeCrop:
    """A crop of random area and aspect ratio, resized (Szegedy et al., 2015)."""

    def __init__(self, config: schema.RandomResizeCrop, *, exact: bool = False) -> None:
        self.config, self.size, self.exact = config, pair(config.size), exact

    def __call__(self, image: Image.Image | Tensor) -> Image.Image | Tensor:
        box = self.draw(*height_width(image))
        if self.exact:
            return resize_exactly(image, self.size, self.config.interpolation, box)
        return resize(image, self.size, self.config.interpolation, box)

    def draw(self, height: int, width: int) -> Box:
        """(top, left, height, width), distributed as torchvision's ``RandomResizedCrop``.

        All numbers are drawn at once: one call of torch's costs as much as the whole arithmetic.
        """
        (low, high), ratios = self.config.scale, [math.log(ratio) for ratio in self.config.ratio]
        drawn = torch.rand(22, dtype=torch.float64).tolist()
        for share, shape in zip(drawn[:10], drawn[10:20], strict=True):
            area = height * width * (low + (high - low) * share)
            ratio = math.exp(ratios[0] + (ratios[1] - ratios[0]) * shape)
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                return int(drawn[20] * (height - h + 1)), int(drawn[21] * (width - w + 1)), h, w
        # An oblong image into which none of ten fits: its middle, as square as may be.
        w = max(1, min(width, round(height * self.config.ratio[1])))
        h = max(1, min(height, round(width / self.config.ratio[0])))
        return (height - h) // 2, (width - w) // 2, h, w


class RandomFlip:
    """Left and right exchanged with probability ``p``."""

    def __init__(self, config: schema.RandomFlip) -> None:
        self.p = config.p

    def __call__(self, image: Image.Image | Tensor) -> Tensor:
        image_CHW = to_tensor(image)
        return image_CHW.flip(-1) if float(torch.rand(())) < self.p else image_CHW


def square(size: Size) -> int | Size:
    """One number for a square, which is how most encoders want their image size."""
    return size[0] if size[0] == size[1] else size
