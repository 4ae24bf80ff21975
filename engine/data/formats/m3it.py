"""Instructions with images in the files themselves, as M3IT's (hf.co/datasets/MMInstruct/M3IT).

    <root>/train.jsonl  valid.jsonl    {"instruction": …, "inputs": …, "outputs": …,
                                        "image_base64_str": "…" or ["…"]}

one a line, or as one JSON list. A pattern (``*/train.jsonl``) names the files of several tasks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from engine.config.schema import Section
from engine.data.tables.json_rows import Entry, read_rows
from engine.data.tables.paths import annotation_files
from engine.data.tables.source import TableSource, open_rows
from engine.data.tables.table import row_or_fault
from engine.data.tables.values import (
    chosen_images,
    first_answer,
    instruction,
    mapping,
    optional_id,
    required,
    strings,
)
from engine.errors import UserError
from engine.types import BadSample, Place, Row

_IMAGES = ("image_base64_str", "image_str", "image_base64")
_STRING = re.compile(rb'"([^"\\]*(?:\\.[^"\\]*)*)"', re.DOTALL)


class Config(Section):
    """Options of ``format: m3it``; files are relative to ``root``."""

    root: Path  # relative to data.data_path; default: the dataset's name
    train_anno: str | list[str] = "train.jsonl"  # a file or a pattern of files, or several
    valid_anno: str | list[str] = "valid.jsonl"
    several_images: Literal["first", "all", "refuse"] = "first"  # of a sample with more than one


def build(config: Config, *, name: str, split: str, cache_dir: Path) -> TableSource:
    """Open one split. Raises UserError, naming the path, for what is missing or malformed."""
    paths = annotation_files(
        config.root,
        config.valid_anno if split == "valid" else config.train_anno,
        dataset=name,
        option=f"{split}_anno",
        endings=(".jsonl", ".json"),
    )
    if packed := next((path for path in paths if path.suffix == ".gz"), None):
        raise UserError(
            f"{packed} is packed, so that images in it cannot be read one by one; unpack it first",
            key=f"data.datasets.{name}.{split}_anno",
        )
    return open_rows(
        name,
        split,
        paths,
        ("m3it", config.several_images),
        lambda: _rows(paths, config.several_images),
        cache_dir=cache_dir,
        held_in=paths,
        base64=True,
    )


def _rows(paths: list[Path], several: str) -> Iterator[Row]:
    for path in paths:
        with path.open("rb") as file:
            for entry in read_rows(path):
                file.seek(entry.offset)
                content = b"" if entry.fault else file.read(entry.extent)
                where = f"{path.name} entry {entry.number}"
                yield row_or_fault(where, _row, entry, content, path, several)


def _row(entry: Entry, content: bytes, path: Path, several: str) -> Row:
    if entry.fault:
        raise BadSample("malformed", entry.fault)
    sample = mapping(entry.value, "the entry")
    turns = instruction(
        required(sample, "instruction"), sample.get("inputs"), required(sample, "outputs")
    )
    return Row(
        images=tuple(
            Place(str(path), entry.offset + first, end - first)
            for first, end in (_span(content, text) for text in _texts(sample, several))
        ),
        caption=first_answer(turns),
        caption_id=optional_id(sample, "id"),
        turns=turns,
    )


def _texts(sample: Mapping[str, Any], several: str) -> tuple[str, ...]:
    """The base64 texts of a sample's images, none where it has no image."""
    texts = next((found for key in _IMAGES if (found := strings(sample.get(key), key))), ())
    if not all(texts):
        raise BadSample("missing", "the image is an empty text")
    return chosen_images(texts, several)


def _span(content: bytes, text: str) -> tuple[int, int]:
    """Where a text of a JSON entry is in its bytes, without its quotes."""
    spelled = text.encode(errors="surrogateescape")
    first = content.find(b'"' + spelled + b'"') + 1
    if first:
        return first, first + len(spelled)
    for match in _STRING.finditer(content):
        if json.loads(match[0].decode(errors="surrogateescape")) == text:
            return match.span(1)
    raise BadSample("unreadable", "the image's text is not where its entry is")
