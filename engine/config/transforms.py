"""Options of the image transforms and of the text's augmentation, one section a transform."""

# ruff: noqa: RUF012 - pydantic copies a default for each section that is made
from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from engine.config.section import Fraction, Names, NonNegativeInt, Section


class Resize(Section):
    size: PositiveInt | tuple[PositiveInt, PositiveInt] = 256
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"


class Crop(Section):
    size: PositiveInt | tuple[PositiveInt, PositiveInt] = 224
    padding: NonNegativeInt = 0


class RandomResizeCrop(Section):
    size: PositiveInt | tuple[PositiveInt, PositiveInt] = 224
    scale: tuple[PositiveFloat, PositiveFloat] = (0.08, 1.0)
    ratio: tuple[PositiveFloat, PositiveFloat] = (3 / 4, 4 / 3)
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"


class RandomFlip(Section):
    p: Fraction = 0.5


class AutoAug(Section):
    policy: Literal["imagenet", "cifar10", "svhn"] = "imagenet"


class ColorJitter(Section):
    brightness: NonNegativeFloat = 0.4
    contrast: NonNegativeFloat = 0.4
    saturation: NonNegativeFloat = 0.4
    hue: Annotated[float, Field(ge=0.0, le=0.5)] = 0.0
    p: Fraction = 1.0


class RandomErasing(Section):
    p: Fraction = 0.25
    scale: tuple[PositiveFloat, PositiveFloat] = (0.02, 0.33)


class Normalize(Section):
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)


class TextAugment(Section):
    """Share of word pieces that training masks, replaces at random, or deletes."""

    mask: Fraction = 0.0
    random: Fraction = 0.0
    delete: Fraction = 0.0


class Transforms(Section):
    train_transforms: Names = ["random_resize_crop", "random_flip"]
    valid_transforms: Names = ["resize", "center_crop"]
    # How images come to the lists' size, instead of by the resizes and crops there. pad: in full,
    # with margins of the mean colour; crop: their middle; resize: in full, stretched.
    image_aspect_ratio: Literal["pad", "crop", "resize"] | None = None
    resize: Resize = Resize()
    resize_bicubic: Resize = Resize(interpolation="bicubic")
    center_crop: Crop = Crop()
    random_crop: Crop = Crop()
    random_resize_crop: RandomResizeCrop = RandomResizeCrop()
    random_flip: RandomFlip = RandomFlip()
    autoaug: AutoAug = AutoAug()
    color_jitter: ColorJitter = ColorJitter()
    random_erasing: RandomErasing = RandomErasing()
    normalize: Normalize = Normalize()
    text_augment: TextAugment = TextAugment()
