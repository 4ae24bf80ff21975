"""Examples of an evaluation: images with their own captions and those found or generated.

One list serves the report (HTML), TensorBoard (a sheet of pictures and a table) and W&B.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from PIL import Image, ImageDraw, ImageFont

SIDE = 224  # pixels of an image's longer side
_COLUMNS = 4  # of the sheet
_GAP = 6  # pixels between its pictures
_NUM_OWN = 5  # own captions shown


@dataclass(frozen=True)
class Example:
    """An image of at most SIDE pixels, its own captions, and those that a model gave it."""

    image: Image.Image  # RGB
    captions: Sequence[str]
    found: Sequence[tuple[str, float | None]]  # (caption, cosine), best first; generated: no cosine
    name: str = ""  # the image's id


def article(example: Example) -> str:
    """An example as HTML; own captions among those found are marked, whatever their writing."""
    own = {_words(caption) for caption in example.captions}
    given = "".join(
        f'<li dir="auto"{_mark(caption, own)}>'
        f"{escape(caption) or '<small>nothing</small>'}"
        f"{'' if score is None else f' <small>{_figure(score)}</small>'}</li>"
        for caption, score in example.found
    )
    told = "".join(
        f'<p dir="auto">{escape(caption)}</p>' for caption in example.captions[:_NUM_OWN]
    )
    name = f"<p><small>{escape(example.name)}</small></p>" if example.name else ""
    kind = "ol" if len(example.found) > 1 else "ul"
    return (
        f'<article><img alt="{escape(example.name)}" src="{_data_uri(example.image)}">'
        f"<{kind}>{given}</{kind}>{told}{name}</article>"
    )


def _mark(caption: str, own: set[str]) -> str:
    if not own:
        return ""
    return f' class="{"right" if _words(caption) in own else "wrong"}"'


def _words(caption: str) -> str:
    return " ".join(re.findall(r"\w+", caption.lower()))


def _data_uri(image: Image.Image) -> str:
    out = io.BytesIO()
    image.save(out, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()


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
    head = "| | found | its own | image |\n|---|---|---|---|\n"
    return head + "".join(
        f"| {number} | {found} | {own} | {_cell([example.name])} |\n"
        for number, example in enumerate(examples, 1)
        for found, own in [(_cell(texts(example)), _cell(example.captions[:_NUM_OWN]))]
    )


def _figure(score: float) -> str:
    """Two decimals, and one figure of what they would make nothing."""
    return f"{score:.1g}" if 0 < abs(score) < 0.01 else f"{score:.2f}"


def texts(example: Example) -> list[str]:
    """What was found, with its cosine where there is one."""
    return [c if score is None else f"{c} ({_figure(score)})" for c, score in example.found]


def _cell(said: Sequence[str]) -> str:
    """Lines of a table's cell in which no character of a text has a meaning of its own."""
    plain = (re.sub(r"([\\`*_{}\[\]()#+.!|-])", r"\\\1", " ".join(text.split())) for text in said)
    return "<br>".join(escape(text, quote=False) for text in plain)
