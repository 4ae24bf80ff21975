"""Images in any form, as a model's image encoder takes them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor, nn

from engine.config.schema import Config
from engine.data.decode import decode_by
from engine.data.transforms import pipeline
from engine.types import BadSample

Picture = str | Path | bytes | Image.Image | Tensor
"""A file, its bytes, an image, or a tensor CHW: uint8, or floats of 0 … 1."""


class Pictures:
    """Reads images for a ``VisionLanguage`` as its evaluation does."""

    def __init__(self, model: Any, config: Config) -> None:
        self.model, self.max_pixels = model, config.data.max_image_pixels
        self.transform = pipeline.for_split(config, "valid")

    def __call__(self, image: Picture) -> Tensor:
        """Normalised floats CHW on the model's device. Raises BadSample.

        Floats are stretched to the model's size where they are of another, and keep their graph;
        all else goes through the transforms of evaluation.
        """
        mean_C11, std_C11 = self.model.mean_C11, self.model.std_C11
        if isinstance(image, Tensor) and image.is_floating_point():
            image_CHW = image.to(mean_C11)
            if image_CHW.shape[1:] != self.transform.size:
                image_CHW = nn.functional.interpolate(
                    image_CHW[None], self.transform.size, mode="bilinear", antialias=True
                )[0]
            return (255 * image_CHW - mean_C11) / std_C11
        if isinstance(image, str | Path | bytes):
            image = decode_by(
                self.transform.decoder,
                image if isinstance(image, bytes) else Path(image),
                max_pixels=self.max_pixels,
                target=self.transform.decode_size,
            )
        elif isinstance(image, Image.Image):
            image = image.convert("RGB")
        return (self.transform(image).to(mean_C11) - mean_C11) / std_C11

    def read(
        self, image: Picture, bad: Callable[[Picture, BadSample], None] | None
    ) -> Tensor | None:
        """The same, or None where ``bad`` is told that the image cannot be read."""
        try:
            return self(image)
        except BadSample as error:
            if bad is None:
                raise
            bad(image, error)
            return None
