"""A map of weights laid over an image, with a line of text below."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_SIDE = 448  # pixels of the longer side
_LINE = 34  # below the image
_GLOW = ((0.0, (20, 12, 60)), (0.5, (214, 60, 90)), (1.0, (255, 226, 90)))  # least to most
_OPACITY = 0.72  # where the weight is highest


def draw(image: Image.Image, weight_hw: np.ndarray, text: str) -> Image.Image:
    """An RGB picture: weights 0 … their maximum as a glow, the brighter the higher.

    The map is stretched over the image; a map that is the same everywhere leaves no glow.
    """
    scale = _SIDE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    large = np.asarray(image.convert("RGB").resize(size, Image.Resampling.BICUBIC), np.float32)
    low, high = float(weight_hw.min()), float(weight_hw.max())
    share = (weight_hw - low) / (high - low) if high > low else np.zeros_like(weight_hw)
    small = Image.fromarray(share.astype(np.float32))
    heat = np.asarray(small.resize(size, Image.Resampling.BICUBIC)).clip(0, 1)[..., None]
    places = [place for place, _ in _GLOW]
    glow = np.stack(
        [np.interp(heat[..., 0], places, [rgb[c] for _, rgb in _GLOW]) for c in range(3)], axis=-1
    )
    opacity = _OPACITY * heat if high > low else 0.0
    mixed = Image.fromarray((large * (1 - opacity) + glow * opacity).astype(np.uint8))
    picture = Image.new("RGB", (size[0], size[1] + _LINE), "white")
    picture.paste(mixed)
    pen = ImageDraw.Draw(picture)
    font = ImageFont.load_default(18)
    while len(text) > 1 and pen.textlength(text, font) > size[0] - 16:
        text = text[:-2] + "…"
    pen.text((8, size[1] + _LINE / 2), text, "#1c1d22", font, anchor="lm")
    return picture
