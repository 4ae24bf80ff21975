"""Conversations about images in a JSON list, as LLaVA's (https://github.com/haotian-liu/LLaVA).

    <root>/train.json  valid.json    [{"id": …, "image": "a.jpg", "conversations": [
                                        {"from": "human", "value": "<image>\\nWhat is this?"},
                                        {"from": "gpt", "value": "A cat."}, …]}, …]
    <root>/train/…  valid/…          the images

JSON lines will do as well. ``image`` may be a list, of which ``several_images`` says what is taken.
A sample without ``image`` is text alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from engine.data.tables.json_rows import Entry, read_rows, rows_of
from engine.data.tables.paths import FolderOptions, SplitFolder
from engine.data.tables.source import TableSource, open_rows
from engine.data.tables.table import file_named
from engine.data.tables.values import (
    Several,
    conversation,
    first_answer,
    image_names,
    optional_id,
    required,
)
from engine.types import Row


class Config(FolderOptions):
    """Options of ``format: llava``; files and folders are relative to ``root``."""

    train_anno: str = "train.json"
    valid_anno: str = "valid.json"
    train_images: str = "train"
    valid_images: str = "valid"
    several_images: Several = "first"  # of a sample whose image is a list


def build(config: Config, *, name: str, split: str, cache_dir: Path) -> TableSource:
    """Open one split. Raises UserError, naming the path, for what is missing or malformed."""
    folder = SplitFolder(config, name, split)
    path = folder.file(folder.of(config.train_anno, config.valid_anno), "anno", ".json", ".jsonl")
    options = ("llava", config.several_images)

    def rows() -> Iterator[Row]:
        return rows_of(read_rows(path), "entry", _row, config.several_images)

    source = open_rows(name, split, [path], options, rows, cache_dir=cache_dir)
    if source.parts[0].table.has_values("images"):
        source.images = folder.images(folder.of(config.train_images, config.valid_images))
    return source


def _row(entry: Entry, several: Several) -> Row:
    sample = entry.object("the entry")
    turns = conversation(required(sample, "conversations"))
    images = image_names(sample.get("image"), several)
    return Row(
        images=tuple(map(file_named, images)),
        caption=first_answer(turns),
        caption_id=optional_id(sample, "id"),
        turns=turns,
    )
