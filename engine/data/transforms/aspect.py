"""``transforms.image_aspect_ratio``: images of any shape brought to one size in one of three ways.

    pad     whole: margins in the mean colour, then resized
    crop    resized until it covers the size, then the middle
    resize  whole: stretched

Margins and their colour (its fractions dropped) are those of LLaVA's ``expand2square``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from engine.data.transforms.geometry import (
    MAX_RESIZED_PIXELS,
    Picture,
    Size,
    height_width,
    middle,
    pillow_memory,
    resize,
    to_pil,
    to_tensor,
)
from engine.types import BadSample

_MAX_PADDED_PIXELS = 1 << 26  # a 1 × 100,000 strip made square would fill memory


class Fit:
    """To ``size`` (height, width) as ``how`` says; ``mean`` is a colour of channels in [0, 1]."""

    def __init__(self, how: str, size: Size, interpolation: str, mean: Sequence[float]) -> None:
        self.how, self.size, self.interpolation, self.exact = how, size, interpolation, False
        self.colour = tuple(int(255 * value) for value in mean)

    def __call__(self, image: Picture) -> Picture:
        """Raises BadSample for an image so oblong that its crop would fill memory."""
        if self.how == "crop":
            return self._cropped(image)
        return self._resized(self._padded(image) if self.how == "pad" else image, self.size)

    def _resized(self, image: Picture, size: Size) -> Picture:
        return resize(image, size, self.interpolation, exact=self.exact)

    def _cropped(self, image: Picture) -> Tensor:
        (height, width), (down, across) = height_width(image), self.size
        if height * across <= width * down:
            size = down, width * down // height
        else:
            size = height * across // width, across
        if size[0] * size[1] > MAX_RESIZED_PIXELS:
            raise BadSample("too large", f"{width}×{height} pixels resized by the shorter side")
        top, left, _, _ = box = middle(size, self.size)
        if not self.exact:
            return to_tensor(resize(image, size, self.interpolation, crop=box))
        return to_tensor(self._resized(image, size))[:, top : top + down, left : left + across]

    def _padded(self, image: Picture) -> Picture:
        (height, width), (down, across) = height_width(image), self.size
        if height * across <= width * down:
            whole = -(-width * down // across), width
        else:
            whole = height, -(-height * across // down)
        if whole[0] * whole[1] > _MAX_PADDED_PIXELS:  # resized before: edges differ a little
            inner = round(height * down / whole[0]), round(width * across / whole[1])
            image = self._resized(image, (max(1, inner[0]), max(1, inner[1])))
            whole = self.size
        return self._with_margins(image, whole)

    def _with_margins(self, image: Picture, whole: Size) -> Picture:
        height, width = height_width(image)
        if (height, width) == whole:
            return image
        top, left = (whole[0] - height) // 2, (whole[1] - width) // 2
        if self.exact:
            padded = Image.new("RGB", whole[::-1], self.colour)
            padded.paste(to_pil(image), (left, top))
            return padded
        image_CHW = pillow_memory(image) if isinstance(image, Image.Image) else image
        padded_HWC = torch.empty((*whole, 3), dtype=torch.uint8)
        inner = padded_HWC[top : top + height, left : left + width]
        inner.copy_(image_CHW[:3].permute(1, 2, 0))
        colour = torch.tensor(self.colour, dtype=torch.uint8)
        beside = padded_HWC[:top], padded_HWC[top + height :]
        for margin in (*beside, padded_HWC[:, :left], padded_HWC[:, left + width :]):
            margin.copy_(colour)
        return padded_HWC.permute(2, 0, 1)
