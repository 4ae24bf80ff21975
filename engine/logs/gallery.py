"""Examples of an evaluation: images with their own captions and those found or generated.

One list serves the report, TensorBoard (a sheet of pictures and a table) and W&B.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIDE = 224  # pixels of an image's longer side
_COLUMNS = 4  # of the sheet
_GAP = 6  # pixels between its pictures
_NUM_OWN = 5  # own captions shown
_MAP_SIDE = 448  # pixels of a map's longer side
_LINE = 34  # of text below it
_GLOW = ((20, 214, 255), (12, 60, 226), (60, 90, 90))  # red, green, blue: least, middle, most
_OPACITY = 0.72  # where the weight is highest


@dataclass(frozen=True)
class Example:
    """An image of at most SIDE pixels, its own captions, and those that a model gave it."""

    image: Image.Image  # RGB
    captions: Sequence[str]
    found: Sequence[tuple[str, float | None]]  # (caption, cosine), best first; generated: no cosine
    name: str = ""  # the image's id


def article(example: Example) -> dict[str, Any]:
    """What the template ``example`` shows; own captions among those found are marked.

    Captions are compared word by word, whatever their case and punctuation.
    """
    own = {_words(caption) for caption in example.captions}
    found = []
    for caption, score in example.found:
        mark = "right" if _words(caption) in own else "wrong"
        figure = "" if score is None else _figure(score)
        found.append((caption, mark if own else "", figure))
    out = io.BytesIO()
    example.image.save(out, "JPEG", quality=80)
    return {
        "image": "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode(),
        "found": found,
        "captions": example.captions[:_NUM_OWN],
        "name": example.name,
    }


def _words(caption: str) -> str:
    return " ".join(re.findall(r"\w+", caption.lower()))


def sheet(examples: Sequence[Example]) -> Image.Image:
    """All images in rows of four, each with its number, from 1 on."""
    columns = min(_COLUMNS, len(examples))
    rows = -(-len(examples) // columns)
    cell = SIDE + _GAP
    drawn = Image.new("RGB", (columns * cell + _GAP, rows * cell + _GAP), "white")
    pen, font = ImageDraw.Draw(drawn), ImageFont.load_default()
    for number, example in enumerate(examples):
        left, top = (_GAP + cell * place for place in (number % columns, number // columns))
        width, height = example.image.size
        drawn.paste(example.image, (left + (SIDE - width) // 2, top + (SIDE - height) // 2))
        box = pen.textbbox((left + 3, top + 2), str(number + 1), font=font)
        pen.rectangle((left, top, box[2] + 3, box[3] + 3), fill="black")
        pen.text((left + 3, top + 2), str(number + 1), fill="white", font=font)
    return drawn


def markdown(examples: Sequence[Example]) -> str:
    """A table of the texts, numbered as the sheet is."""
    rows = ["| | found | its own | image |", "|---|---|---|---|"]
    for number, example in enumerate(examples, 1):
        cells = (texts(example), example.captions[:_NUM_OWN], [example.name])
        rows.append(f"| {number} | {' | '.join(map(_cell, cells))} |")
    return "\n".join(rows) + "\n"


def texts(example: Example) -> list[str]:
    """What was found, with its cosine where there is one."""
    return [c if score is None else f"{c} ({_figure(score)})" for c, score in example.found]


def _figure(score: float) -> str:
    """Two decimals, or one significant figure where those would round it to nothing."""
    return f"{score:.1g}" if 0 < abs(score) < 0.01 else f"{score:.2f}"


def _cell(lines: Sequence[str]) -> str:
    """Lines of a table's cell in which no character of a text has a meaning of its own."""
    plain = (re.sub(r"([\\`*_{}\[\]()#+.!|-])", r"\\\1", " ".join(text.split())) for text in lines)
    return "<br>".join(escape(text, quote=False) for text in plain)


def weight_map(image: Image.Image, weight_hw: np.ndarray, text: str) -> Image.Image:
    """An RGB picture: weights 0 … their maximum as a glow over an image, a line of text below.

    The map is stretched over the image; a map that is the same everywhere leaves no glow.
    """
    scale = _MAP_SIDE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    large = np.asarray(image.convert("RGB").resize(size, Image.Resampling.BICUBIC), np.float32)
    low, high = float(weight_hw.min()), float(weight_hw.max())
    share = (weight_hw - low) / (high - low) if high > low else np.zeros_like(weight_hw)
    small = Image.fromarray(share.astype(np.float32))
    heat = np.asarray(small.resize(size, Image.Resampling.BICUBIC)).clip(0, 1)
    glow = np.stack([np.interp(heat, (0, 0.5, 1), channel) for channel in _GLOW], axis=-1)
    opacity = _OPACITY * heat[..., None] if high > low else 0.0
    picture = Image.new("RGB", (size[0], size[1] + _LINE), "white")
    picture.paste(Image.fromarray((large * (1 - opacity) + glow * opacity).astype(np.uint8)))
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(18)
    while len(text) > 1 and pen.textlength(text, font) > size[0] - 16:
        text = text[:-2] + "…"
    pen.text((8, size[1] + _LINE / 2), text, "#1c1d22", font, anchor="lm")
    return picture
