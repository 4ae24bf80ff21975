"""Image transforms by name: decoded image → uint8 CHW tensor of one size.

Geometry runs on tensors, colour operations on PIL images, where torchvision's are the faster ones.
Normalisation is the model's, on the device: ``normalize`` is accepted and does nothing here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

import engine.torchvision_ops  # noqa: F401  isort: skip  before torchvision
from torchvision.transforms import Compose, RandomHorizontalFlip, v2  # isort: skip

from engine import registry
from engine.config import schema
from engine.data.transforms.geometry import (
    Fit,
    Picture,
    RandomResizeCrop,
    Resize,
    Size,
    pair,
    to_pil,
    to_tensor,
)
from engine.errors import UserError
from engine.registry import nearest

Piece = Callable[[Any], Any]
_RESIZES = ("resize", "resize_bicubic")
_SIZED = (*_RESIZES, "center_crop", "random_crop", "random_resize_crop")


def on_pil(operation: Piece) -> Piece:
    """An operation on the PIL form of an image."""
    return Compose([to_pil, operation])


def on_tensor(operation: Piece) -> Piece:
    """An operation on the tensor form of an image."""
    return Compose([to_tensor, operation])


def _random_crop(config: schema.Transforms) -> Piece:
    size, padding = pair(config.random_crop.size), config.random_crop.padding or None
    return on_tensor(v2.RandomCrop(size, padding=padding, pad_if_needed=True))


def _color_jitter(config: schema.Transforms) -> Piece:
    c = config.color_jitter
    jitter = v2.ColorJitter(c.brightness, c.contrast, c.saturation, c.hue)
    return on_pil(jitter if c.p == 1.0 else v2.RandomApply([jitter], c.p))


def _random_erasing(config: schema.Transforms) -> Piece:
    # The mean colour is what a zero written after normalisation would be.
    mean = [round(255 * value) for value in config.normalize.mean]
    erasing = config.random_erasing
    return on_tensor(v2.RandomErasing(erasing.p, scale=erasing.scale, value=mean))


PIECES: dict[str, Callable[[schema.Transforms], Piece]] = {
    "resize": lambda config: Resize(config.resize),
    "resize_bicubic": lambda config: Resize(config.resize_bicubic),
    "center_crop": lambda config: on_tensor(v2.CenterCrop(pair(config.center_crop.size))),
    "random_crop": _random_crop,
    "random_resize_crop": lambda config: RandomResizeCrop(config.random_resize_crop),
    "random_flip": lambda config: on_tensor(RandomHorizontalFlip(config.random_flip.p)),
    "autoaug": lambda config: on_pil(v2.AutoAugment(v2.AutoAugmentPolicy(config.autoaug.policy))),
    "color_jitter": _color_jitter,
    "random_erasing": _random_erasing,
    "normalize": lambda config: Compose([]),
}


@dataclass(frozen=True)
class Pipeline:
    """The named transforms one after another; random through torch's global generator alone.

    ``decode_size`` and ``decoder`` say how images are to be decoded for it.
    """

    pieces: list[Piece]
    size: Size
    decode_size: Size | None
    decoder: str

    def __call__(self, image: Picture, out: Tensor | None = None) -> Tensor:
        """uint8 CHW of ``size``, written to ``out`` where it is given and of that form.

        Raises BadSample for an image that cannot be brought to it.
        """
        image_CHW = to_tensor(Compose(self.pieces)(image))
        if out is None or (out.shape, out.dtype) != (image_CHW.shape, image_CHW.dtype):
            return image_CHW.contiguous()
        if image_CHW.stride(0) == 1 and image_CHW.stride(2) == len(image_CHW):
            return out.copy_(image_CHW)
        for channel, values_HW in zip(out, image_CHW, strict=True):  # half the time of all at once
            channel.copy_(values_HW)
        return out


def for_split(config: schema.Config, split: Literal["train", "valid"]) -> Pipeline:
    """The pipeline that a run's training or evaluation reads images by. Raises UserError."""
    transforms, key = config.transforms, f"transforms.{split}_transforms"
    names = transforms.train_transforms if split == "train" else transforms.valid_transforms
    return build(names, transforms, key, config.data.decoder, config.options)


def build(
    names: list[str],
    config: schema.Transforms,
    key: str,
    decoder: str = "auto",
    options: Mapping[str, Any] | None = None,
) -> Pipeline:
    """The pipeline of the names at the dotted ``key``, for ``data.decoder``. Raises UserError.

    ``options`` are those of transforms from outside.
    """
    made = [_piece(name, config, key, options or {}) for name in names]
    size = output_size(names, config, key)
    fit = None
    if config.image_aspect_ratio is not None:
        interpolation = fit_interpolation(names, config)
        fit = Fit(config.image_aspect_ratio, size, interpolation, config.normalize.mean)
    pieces: list[Piece] = []
    crop = pair(config.center_crop.size)
    for name, piece in zip(names, made, strict=True):
        before = pieces[-1] if pieces else None
        if fit is not None and name in _SIZED:  # in place of all of them, where the first one is
            pieces += [fit] if fit not in pieces else []
        elif name == "center_crop" and isinstance(before, Resize) and before.covers(crop):
            pieces[-1] = Resize(before.config, crop)  # computes only what the crop keeps
        else:
            pieces.append(piece)
    if decoder == "pillow_exact":
        for piece in pieces:
            if isinstance(piece, Resize | RandomResizeCrop | Fit):
                piece.exact = True
        return Pipeline(pieces, size, None, decoder)
    # a transform from outside is given a Pillow image
    decoder = decoder if names[0] in PIECES else "pillow"
    return Pipeline(pieces, size, _decode_size(names, config), decoder)


def _piece(name: str, config: schema.Transforms, key: str, options: Mapping[str, Any]) -> Piece:
    if name not in PIECES and "." in name:
        return registry.build("data/transforms", name, config, key=key, options=options)
    if name not in PIECES:
        raise UserError(f"no transform is called {name!r}; {nearest(name, list(PIECES))}", key=key)
    try:
        return PIECES[name](config)
    except (ValueError, TypeError) as error:
        raise UserError(f"transforms.{name}: {error}", key=f"transforms.{name}") from error


def fit_interpolation(names: list[str], config: schema.Transforms) -> str:
    """How ``image_aspect_ratio`` resizes: as the first of the names that does."""
    for name in names:
        if name in (*_RESIZES, "random_resize_crop"):
            return getattr(config, name).interpolation
    return config.resize_bicubic.interpolation


def output_size(names: list[str], config: schema.Transforms, key: str = "transforms") -> Size:
    """(height, width) that the transforms put out.

    Raises UserError where images would keep different sizes, of which no batch can be made.
    """
    for name in (name for name in reversed(names) if name in _SIZED):
        size = getattr(config, name).size
        if name not in _RESIZES or isinstance(size, tuple) or config.image_aspect_ratio is not None:
            return pair(size)
        raise UserError(
            f"{key}: {name} by the shorter side to {size} leaves images of different shapes; "
            f"add center_crop after it, or set transforms.{name}.size: [{size}, {size}]",
            key=key,
        )
    raise UserError(
        f"{key}: {names} brings images to no common size; add resize and center_crop, or "
        "random_resize_crop",
        key=key,
    )


def _decode_size(names: list[str], config: schema.Transforms) -> Size | None:
    """(height, width) below which an image may not be shrunk while decoding; None: not at all.

    For a random crop it is so large that even the smallest and most oblong crop out of the shrunk
    image has as many pixels a side as are put out.
    """
    for name in names:
        if name in _SIZED and config.image_aspect_ratio is not None:
            return output_size(names, config)
        if name in _RESIZES:
            return pair(getattr(config, name).size)
        if name == "random_resize_crop":
            crop = config.random_resize_crop
            oblong = min(crop.ratio[0], 1 / crop.ratio[1], 1.0)
            grow = (crop.scale[0] * oblong) ** -0.5
            longest = math.ceil(max(pair(crop.size)) * grow)
            return longest, longest
        if name in _SIZED or name not in PIECES:
            return None  # taken at the image's own scale
    return None
