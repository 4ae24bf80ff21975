"""Images that are not as large as an image encoder wants them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from engine.errors import UserError


def wrong_size(image_BCHW: Tensor, size: Sequence[int]) -> UserError:
    """The error of images that are not as large as an image encoder with fixed positions wants."""
    height, width = image_BCHW.shape[2:]
    return UserError(
        f"the transforms put out images of {height} × {width} pixels, but the image encoder takes "
        f"{size[0]} × {size[1]}; let train and valid transforms put out one size, and leave "
        "image_size out or set it to that",
        key="model.image_encoder.image_size",
    )
