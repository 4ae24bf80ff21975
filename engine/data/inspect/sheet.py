"""A contact sheet: images of a dataset with their captions, as one PNG."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from engine.data.inspect.read import Example
from engine.types import Record

COLUMNS, ROWS = 6, 4
_CELL, _MARGIN, _LINES, _LINE = 200, 10, 5, 15  # pixels; lines of text
_FONT_SIZE = 12


def write_sheet(path: Path, title: str, examples: Sequence[Example]) -> None:
    """Write the sheet, whole or not at all."""
    font = ImageFont.load_default(_FONT_SIZE)
    height = _CELL + _LINES * _LINE + _MARGIN
    rows = -(-len(examples) // COLUMNS)
    size = (COLUMNS * (_CELL + _MARGIN) + _MARGIN, rows * height + 3 * _MARGIN)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((_MARGIN, _MARGIN // 2), title, "black", font)
    for number, example in enumerate(examples):
        down, across = divmod(number, COLUMNS)
        left = _MARGIN + across * (_CELL + _MARGIN)
        top = 3 * _MARGIN + down * height
        with Image.open(io.BytesIO(example.jpeg)) as opened:
            picture = opened.convert("RGB")
        picture.thumbnail((_CELL, _CELL))
        sheet.paste(picture, (left, top + _CELL - picture.height))
        for line, text in enumerate(_wrapped(said(example.records[0]), font)):
            draw.text((left, top + _CELL + 3 + line * _LINE), text, "black", font)
    temporary = path.with_name(f".{path.name}.making")
    sheet.save(temporary, "PNG")
    temporary.replace(path)


def said(record: Record) -> str:
    """What a row says, in one line: its caption, or who says what, and its labels."""
    text = record.caption
    if record.turns:
        text = " ".join(f"{who}: {what}" for who, what in record.turns)
    if record.labels and ", ".join(record.labels) != record.caption:
        text += f" [{', '.join(record.labels)}]"
    return " ".join(text.split())


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    """Lines that fit into a cell; a word longer than a line is cut."""
    lines = [""]
    for word in text[:1000].split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= _CELL:
            lines[-1] = longer
            continue
        if len(lines) == _LINES:
            lines[-1] += " …"
            break
        while word and font.getlength(word) > _CELL:
            word = word[:-1]
        lines.append(word)
    return [line for line in lines if line]
