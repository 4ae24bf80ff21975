"""Resizing, cropping and mirroring in uint8.

Resizing dominates a naive loader. Here torch's native kernel does it, on the memory that the image
was decoded into: antialiased, within two grey levels of Pillow's own (less than 0.05 on average),
several times its speed. Where ``exact`` is asked for, Pillow does it.

The kernel wants HWC memory. Left to itself torch gives back CHW, whose making takes a third of the
whole time. Here memory stays HWC until the pixels are written to their batch; and of a result that
is to be cropped, what is below the crop or right of it is never computed.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

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
MAX_RESIZED_PIXELS = 1 << 24  # a 1 × 100,000 strip resized by its shorter side would fill memory
_NUM_CHANNELS = 4  # Pillow keeps RGB in four bytes, the last of them unused


def pair(size: int | Size) -> Size:
    """(height, width) of a size that may be one number for both."""
    return size if isinstance(size, tuple) else (size, size)


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


def pillow_memory(image: Image.Image) -> Tensor:
    """An RGB image's own memory as uint8 CHW of four channels (the fourth means nothing).

    Read only: it is the image's. An image too large for one block of Pillow's memory is copied.
    """
    try:
        pixels = pa.array(image)  # the Arrow interface of Pillow 11.2 and later
    except (ValueError, MemoryError, TypeError, pa.ArrowInvalid):
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)
    buffer = pixels.values.buffers()[1]
    shape = (image.height, image.width, _NUM_CHANNELS)
    return _read_only(np.frombuffer(buffer, np.uint8).reshape(shape)).permute(2, 0, 1)


def _read_only(pixels_HWC: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels_HWC)


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch warns once that the memory could be written to
    _read_only(np.frombuffer(b"\0", np.uint8))


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

    ``exact``: bit for bit as Pillow does it, without ``crop``.
    """
    if exact:
        assert crop is None
        whole = to_pil(image)
        if box is not None:
            top, left, height, width = box
            whole = whole.crop((left, top, left + width, top + height))
        return whole.resize(size[::-1], _PILLOWS[interpolation])
    image_CHW = pillow_memory(image) if isinstance(image, Image.Image) else image
    if box is not None:
        top, left, height, width = box
        image_CHW = image_CHW[:, top : top + height, left : left + width]
    return resample(image_CHW, size, interpolation, crop)[:3]


def resample(image_CHW: Tensor, size: Size, interpolation: str, crop: Box | None = None) -> Tensor:
    """An image of 3 or 4 channels brought to ``size``; of that only the box ``crop``, if given.

    Memory of HWC order is read without a copy; the result's is in this order, and may have gaps.
    """
    image_1CHW = _channels_last(image_CHW)
    given = tuple(image_CHW.shape[1:])
    top, left, height, width = crop or (0, 0, *size)
    if given != size:
        # The scale fixes where the result begins, not where it ends.
        end = _end(given[0], size[0], top + height), _end(given[1], size[1], left + width)
        scale = size[0] / given[0], size[1] / given[1]
        image_1CHW = _OPERATIONS[interpolation](image_1CHW, end, False, *scale)
    return image_1CHW[0, :, top : top + height, left : left + width]


def _end(given: int, whole: int, wanted: int) -> int:
    """How many pixels to compute of ``whole``, the first ``wanted`` being of use."""
    # With as many as were given, the kernel would do nothing.
    return whole if wanted == given else wanted


def _channels_last(image_CHW: Tensor) -> Tensor:
    """1CHW in the strides by which torch knows images whose memory is HWC."""
    channels, height, width = image_CHW.shape
    strides = (height * width * channels, 1, width * channels, channels)
    if image_CHW.stride() != strides[1:]:
        image_CHW = image_CHW.permute(1, 2, 0).contiguous()
    return image_CHW.as_strided((1, channels, height, width), strides)


def middle(size: Size, crop: Size) -> Box:
    """The box of a crop about the middle of an image, rounded as torchvision's center_crop."""
    return round((size[0] - crop[0]) / 2), round((size[1] - crop[1]) / 2), *crop


class Resize:
    """To (height, width) exactly, or by the shorter side to an int; then cropped about the middle,
    where ``crop`` says how large."""

    def __init__(self, config: schema.Resize, crop: Size | None = None) -> None:
        self.config, self.crop, self.exact = config, crop, False

    def __call__(self, image: Picture) -> Picture:
        size = self._size(*height_width(image))
        crop = None if self.crop is None else middle(size, self.crop)
        return resize(image, size, self.config.interpolation, crop=crop, exact=self.exact)

    def _size(self, height: int, width: int) -> Size:
        if isinstance(self.config.size, tuple):
            return self.config.size
        short = self.config.size
        long = short * max(height, width) // min(height, width)
        if long * short > MAX_RESIZED_PIXELS:
            raise BadSample("too large", f"{width}×{height} pixels resized by the shorter side")
        return (short, long) if height <= width else (long, short)

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


class RandomFlip:
    """Left and right exchanged with probability ``p``."""

    def __init__(self, config: schema.RandomFlip) -> None:
        self.p = config.p

    def __call__(self, image: Picture) -> Tensor:
        image_CHW = to_tensor(image)
        return image_CHW.flip(-1) if float(torch.rand(())) < self.p else image_CHW


def square(size: Size) -> int | Size:
    """One number for a square, which is how most encoders want their image size."""
    return size[0] if size[0] == size[1] else size
