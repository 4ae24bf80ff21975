"""A source's rows as examples to look at."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from engine.data.decode import decode
from engine.data.image_files import read_image
from engine.evals.predictions import Prediction
from engine.logs.gallery import SIDE, Example
from engine.types import BadSample, EncodedImage, Source

_NUM_CANDIDATES = 3  # shown of best_of_n's


def retrieved(
    source: Source, row: int, captions: Sequence[tuple[int, float]], max_pixels: int
) -> Example:
    """An image with its own caption, and those found for it: (row, cosine), best first."""
    shown = source[row]
    found = [(source[other].caption, cosine) for other, cosine in captions]
    return Example(thumbnail(shown.images, max_pixels), [shown.caption], found, shown.image_id)


def spoken(source: Source, prediction: Prediction, max_pixels: int) -> Example:
    """An image with its references and what was said of it; of best_of_n, the best few."""
    image = thumbnail(source[prediction.row].images, max_pixels)
    liked = zip(prediction.candidates, prediction.cosines, strict=False)  # both or neither
    said: list[tuple[str, float | None]] = [
        *sorted(liked, key=lambda pair: -pair[1])[:_NUM_CANDIDATES]
    ]
    said = said or [(prediction.caption, None)]
    return Example(image, prediction.references, said, prediction.image_id)


def thumbnail(images: Sequence[EncodedImage], max_pixels: int) -> Image.Image:
    """The first image, upright and RGB, its longer side SIDE at most; grey where there is none."""
    try:
        data = read_image(images[0]) if images else b""
        small = decode(data, max_pixels=max_pixels, target=(SIDE, SIDE)).copy()
    except BadSample:
        return Image.new("RGB", (SIDE, SIDE), "grey")
    small.thumbnail((SIDE, SIDE))
    return small
