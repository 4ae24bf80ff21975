"""Instructions with images in the files themselves, as M3IT's (hf.co/datasets/MMInstruct/M3IT).

    <root>/train.jsonl  valid.jsonl    {"instruction": …, "inputs": …, "outputs": …,
                                        "image_base64_str": "…" or ["…"]}

one a line, or as one JSON list. A pattern (``*/train.jsonl``) names the files of several tasks.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from engine.config.schema import Section
from engine.data.tables.annotations import Row, open_annotations, row_or_fault
from engine.data.tables.fields import chosen_images, identity, instruction, mapping, required
from engine.data.tables.json_images import JsonImages, image_texts
from engine.data.tables.json_rows import Entry, read_rows
from engine.data.tables.places import annotation_files
from engine.data.tables.source import AnnotationSource
from engine.errors import UserError
from engine.types import BadSample


class Config(Section):
    """Options of ``format: m3it``; files are relative to ``root``."""

    root: Path  # relative to data.data_path; default: the dataset's name
    train_anno: str | list[str] = "train.jsonl"  # a file or a pattern of files, or several
    valid_anno: str | list[str] = "valid.jsonl"
    several_images: Literal["first", "all", "refuse"] = "first"  # of a sample with more than one


def build(config: Config, *, name: str, split: str, cache_dir: Path) -> AnnotationSource:
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
    options = ("m3it", config.several_images)
    table = open_annotations(
        paths, options, lambda: _rows(paths, config.several_images), cache_dir=cache_dir
    )
    return AnnotationSource(name, split, table, store=JsonImages(paths))


def _rows(paths: list[Path], several: str) -> Iterator[Row]:
    for file, path in enumerate(paths):
        for entry in read_rows(path):
            yield row_or_fault(f"{path.name} entry {entry.number}", _row, entry, file, several)


def _row(entry: Entry, file: int, several: str) -> Row:
    if entry.fault:
        raise BadSample("malformed", entry.fault)
    sample = mapping(entry.value, "the entry")
    turns = instruction(
        required(sample, "instruction"), sample.get("inputs"), required(sample, "outputs")
    )
    images = chosen_images(image_texts(sample), several)
    own = sample.get("id")
    return Row(
        caption_id=None if own is None else identity(own, "the id"),
        turns=turns,
        place=(file, entry.offset, entry.extent) if images else None,
        num_images=max(1, len(images)),
    )
