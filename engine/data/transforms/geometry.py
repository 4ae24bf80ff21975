"""Resizing and cropping in uint8.

Resizing dominates a naive loader. Here torch's native kernel does it, on the memory that the image
was decoded into: antialiased, within two grey levels of Pillow's own (less than 0.05 on average),
several times its speed. Where ``exact`` is asked for, Pillow does it.

The kernel wants HWC memory. Left to itself torch gives back CHW, whose making takes a third of the
whole time. Here memory stays HWC until the pixels are written to their batch; and of a result that
is to be cropped, what is below the crop or right of it is never computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch import Tensor

from engine.config import schema
from engine.types import BadSample

Picture = Image.Image | Tensor
Size = tuple[int, int]  # height, width
Box = tuple[int, int, int, int]  # top, left, height, width

_PILLOWS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
# The operations below torch.nn.functional.interpolate: they take a scale beside the output's size.
_OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "bilinear": torch.ops.aten._upsample_bilinear2d_aa.default,
    "bicubic": torch.ops.aten._upsample_bicubic2d_aa.default,
}
# a 1 × 100,000 strip resized by its shorter side, or made square, would fill memory
_MAX_RESIZED_PIXELS, _MAX_PADDED_PIXELS = 1 << 24, 1 << 26


def pair(size: int | Size) -> Size:
    """(height, width) of a size that may be one number for both."""
    return size if isinstance(size, tuple) else (size, size)


def square(size: Size) -> int | Size:
    """One number for a square, which is how most encoders want their image size."""
    return size[0] if size[0] == size[1] else size


def height_width(image: Picture) -> Size:
    """Of a decoded image of either form."""
    if isinstance(image, Image.Image):
        return image.height, image.width
    return image.shape[-2], image.shape[-1]


def to_tensor(image: Picture) -> Tensor:
    """uint8 CHW; the memory stays HWC, which is the resize kernel's order."""
    if isinstance(image, Tensor):
        return image
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def to_pil(image: Picture) -> Image.Image:
    if isinstance(image, Image.Image):
        return image
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())


def pixels_of(image: Picture) -> Tensor:
    """An image's own memory as uint8 CHW, not to be written to; Pillow's has a fourth channel that
    means nothing. An image too large for one block of Pillow's memory is copied."""
    if isinstance(image, Tensor):
        return image
    try:
        pixels = pa.array(image).values  # the Arrow interface of Pillow 11.2 and later
    except (ValueError, MemoryError, TypeError, pa.ArrowInvalid):
        return to_tensor(image)
    return torch.from_dlpack(pixels).view(image.height, image.width, 4).permute(2, 0, 1)


def resize(
    image: Picture,
    size: Size,
    interpolation: str,
    box: Box | None = None,
    crop: Box | None = None,
    *,
    exact: bool = False,
) -> Picture:
    """Antialiased resize of ``box`` to ``size``, and of that only the box ``crop``.

    ``exact``: bit for bit as Pillow does it.
    """
    if exact:
        whole = to_pil(image) if box is None else to_pil(image).crop(_edges(box))
        whole = whole.resize(size[::-1], _PILLOWS[interpolation])
        return whole if crop is None else whole.crop(_edges(crop))
    image_CHW = pixels_of(image)
    if box is not None:
        top, left, height, width = box
        image_CHW = image_CHW[:, top : top + height, left : left + width]
    return resample(image_CHW, size, interpolation, crop)[:3]


def _edges(box: Box) -> tuple[int, int, int, int]:
    """A box as Pillow has it: left, top, right, bottom."""
    top, left, height, width = box
    return left, top, left + width, top + height


def resample(image_CHW: Tensor, size: Size, interpolation: str, crop: Box | None = None) -> Tensor:
    """An image of 3 or 4 channels brought to ``size``; of that only the box ``crop``, if given.

    Memory of HWC order is read without a copy; the result's is in this order, and may have gaps.
    """
    channels, *given = image_CHW.shape
    # 1CHW in the strides by which torch knows images whose memory is HWC
    strides = (given[0] * given[1] * channels, 1, given[1] * channels, channels)
    if image_CHW.stride() != strides[1:]:
        image_CHW = image_CHW.permute(1, 2, 0).contiguous()
    image_1CHW = image_CHW.as_strided((1, channels, *given), strides)
    top, left, height, width = crop or (0, 0, *size)
    if tuple(given) != size:
        # The scale fixes where the result begins, not where it ends: what is of use is computed.
        # With an end as far as was given the kernel would do nothing.
        wanted = top + height, left + width
        end = [size[i] if wanted[i] == given[i] else wanted[i] for i in (0, 1)]
        scale = size[0] / given[0], size[1] / given[1]
        image_1CHW = _OPERATIONS[interpolation](image_1CHW, end, False, *scale)
    return image_1CHW[0, :, top : top + height, left : left + width]


def _middle(size: Size, crop: Size) -> Box:
    """The box of a crop about the middle of an image, rounded as torchvision's center_crop."""
    return round((size[0] - crop[0]) / 2), round((size[1] - crop[1]) / 2), *crop


def _covering(image: Picture, least: Size) -> Size:
    """The size at which an image just covers ``least``. Raises BadSample for very oblong ones."""
    (height, width), (down, across) = height_width(image), least
    size = max(down, height * across // width), max(across, width * down // height)
    if size[0] * size[1] > _MAX_RESIZED_PIXELS:
        raise BadSample("too large", f"{width}×{height} pixels resized by the shorter side")
    return size


class Resize:
    """To (height, width), or by the shorter side to an int; then to ``crop`` about the middle."""

    def __init__(self, config: schema.Resize, crop: Size | None = None) -> None:
        self.config, self.crop, self.exact = config, crop, False

    def __call__(self, image: Picture) -> Picture:
        size = self.config.size
        if not isinstance(size, tuple):
            size = _covering(image, (size, size))
        crop = None if self.crop is None else _middle(size, self.crop)
        return resize(image, size, self.config.interpolation, crop=crop, exact=self.exact)

    def covers(self, crop: Size) -> bool:
        """Whether this puts out whole images, and a crop of that size fits inside each."""
        sides = zip(pair(self.config.size), crop, strict=True)
        return self.crop is None and all(have >= keep for have, keep in sides)


class RandomResizeCrop:
    """A crop of random area and aspect ratio, resized (Szegedy et al., 2015)."""

    def __init__(self, config: schema.RandomResizeCrop) -> None:
        self.config, self.size, self.exact = config, pair(config.size), False

    def __call__(self, image: Picture) -> Picture:
        box = self.draw(*height_width(image))
        return resize(image, self.size, self.config.interpolation, box, exact=self.exact)

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


class Fit:
    """``transforms.image_aspect_ratio``: images of any shape brought to one ``size``.

    ``pad``: whole, with margins as LLaVA's ``expand2square`` has them, in the mean colour without
    its fractions; ``crop``: resized until it covers the size, then the middle; ``resize``:
    stretched. ``mean`` is of channels in [0, 1].
    """

    def __init__(self, how: str, size: Size, interpolation: str, mean: Sequence[float]) -> None:
        self.how, self.size, self.interpolation, self.exact = how, size, interpolation, False
        self.colour = tuple(int(255 * value) for value in mean)

    def __call__(self, image: Picture) -> Picture:
        """Raises BadSample for an image so oblong that its crop would fill memory."""
        if self.how != "crop":
            return self._resized(self._padded(image) if self.how == "pad" else image, self.size)
        size = _covering(image, self.size)
        return self._resized(image, size, _middle(size, self.size))

    def _resized(self, image: Picture, size: Size, crop: Box | None = None) -> Picture:
        return resize(image, size, self.interpolation, crop=crop, exact=self.exact)

    def _padded(self, image: Picture) -> Picture:
        (height, width), (down, across) = height_width(image), self.size
        whole = max(height, -(-width * down // across)), max(width, -(-height * across // down))
        if whole[0] * whole[1] > _MAX_PADDED_PIXELS:  # resized before: edges differ a little
            inner = round(height * down / whole[0]), round(width * across / whole[1])
            image = self._resized(image, (max(1, inner[0]), max(1, inner[1])))
            whole, (height, width) = self.size, height_width(image)
        if (height, width) == whole:
            return image
        top, left = (whole[0] - height) // 2, (whole[1] - width) // 2
        if self.exact:
            padded = Image.new("RGB", whole[::-1], self.colour)
            padded.paste(to_pil(image), (left, top))
            return padded
        padded_HWC = torch.empty((*whole, 3), dtype=torch.uint8)
        inner_HWC = padded_HWC[top : top + height, left : left + width]
        inner_HWC.copy_(pixels_of(image)[:3].permute(1, 2, 0))
        colour = torch.tensor(self.colour, dtype=torch.uint8)
        for edges_HWC in (padded_HWC[:top], padded_HWC[top + height :]):
            edges_HWC.copy_(colour)
        for edges_HWC in (padded_HWC[:, :left], padded_HWC[:, left + width :]):
            edges_HWC.copy_(colour)
        return padded_HWC.permute(2, 0, 1)
