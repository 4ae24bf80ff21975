"""Instructions with images in the files themselves, as M3IT's (hf.co/datasets/MMInstruct/M3IT).

    <root>/train.jsonl  valid.jsonl    {"instruction": …, "inputs": …, "outputs": …,
                                        "image_base64_str": "…" or ["…"]}

one a line, or as one JSON list. A pattern (``*/train.jsonl``) names the files of several tasks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from engine.data.tables.json_rows import Entry, read_rows
from engine.data.tables.paths import FolderOptions, SplitFolder
from engine.data.tables.source import TableSource, open_rows
from engine.data.tables.table import row_or_fault
from engine.data.tables.values import (
    Several,
    chosen_images,
    first_answer,
    instruction,
    optional_id,
    required,
    strings,
)
from engine.types import BadSample, Place, Row

_IMAGES = ("image_base64_str", "image_str", "image_base64")
_STRING = re.compile(rb'"([^"\\]*(?:\\.[^"\\]*)*)"', re.DOTALL)


class Config(FolderOptions):
    """Options of ``format: m3it``; files are relative to ``root``."""

    train_anno: str | list[str] = "train.jsonl"  # a file or a pattern of files, or several
    valid_anno: str | list[str] = "valid.jsonl"
    several_images: Several = "first"  # of a sample with more than one


def build(config: Config, *, name: str, split: str, cache_dir: Path) -> TableSource:
    """Open one split. Raises UserError, naming the path, for what is missing or malformed."""
    folder, option = SplitFolder(config, name, split), f"{split}_anno"
    patterns = folder.of(config.train_anno, config.valid_anno)
    paths = folder.files(patterns, option, ".jsonl", ".json")
    if packed := next((path for path in paths if path.suffix == ".gz"), None):
        raise folder.error(
            f"has {packed}, in which images cannot be read one by one; unpack it first",
            option,
        )
    options = ("m3it", config.several_images)
    rows = partial(_rows, paths, config.several_images)
    return open_rows(
        name, split, paths, options, rows, cache_dir=cache_dir, held_in=paths, base64=True
    )


def _rows(paths: list[Path], several: Several) -> Iterator[Row]:
    for path in paths:
        with path.open("rb") as file:
            for entry in read_rows(path):
                file.seek(entry.offset)
                content = b"" if entry.fault else file.read(entry.extent)
                where = f"{path.name} entry {entry.number}"
                yield row_or_fault(where, _row, entry, content, path, several)


def _row(entry: Entry, content: bytes, path: Path, several: Several) -> Row:
    sample = entry.object("the entry")
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


def _texts(sample: Mapping[str, Any], several: Several) -> tuple[str, ...]:
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
