"""A folder with an annotation CSV and an image folder for each split (the form of ZeroVL).

The folder ``root`` holds

    <root>/train_anno.csv  valid_anno.csv    image,image_id,caption,caption_id
    <root>/train/…  valid/…                  the images
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field

from engine.config.schema import Section
from engine.data.table import Table, open_csv
from engine.errors import UserError
from engine.types import BadSample, Record

Column = Literal["image", "image_id", "caption", "caption_id"]


class Config(Section):
    """Options of ``format: csv``; files and folders are relative to ``root``."""

    root: Path  # relative to data.data_path; default: the dataset's name
    train_anno: str = "train_anno.csv"
    valid_anno: str = "valid_anno.csv"
    train_images: str = "train"
    valid_images: str = "valid"
    columns: dict[Column, str] = Field(default={})  # the CSV's own names, where unusual


class CsvSource:
    """Rows of one split."""

    def __init__(self, name: str, split: str, table: Table, images: Path) -> None:
        self.name = name
        self.split = split
        self.table = table
        self.images = images
        self._root = os.path.realpath(images) + os.sep

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> Record:
        """The row at ``index``; BadSample where it has no caption or its image lies elsewhere."""
        row = self.table.row(index)
        if not row["caption"].strip():
            raise BadSample("no caption", f"row {index + 1}")
        if not row["image"]:
            raise BadSample("missing", f"row {index + 1} names no image")
        path = self.images / row["image"]
        if not os.path.realpath(path).startswith(self._root):
            raise BadSample("outside root", f"{path} is a link to {path.resolve()}")
        return Record(row["image"], path, row["caption"], row["image_id"], row["caption_id"])

    def column(self, name: str) -> np.ndarray:
        """int64 codes of ``image_id`` or ``caption_id``, equal where the ids are."""
        return self.table.codes(name)

    def captions(self) -> Iterator[str]:
        """All captions in order, without their images."""
        return self.table.values("caption")


def build(config: Config, *, name: str, split: str, cache_dir: Path) -> CsvSource:
    """Open one split. Raises UserError, naming the path, for what is missing or malformed."""
    anno, folder = (config.train_anno, config.train_images)
    if split == "valid":
        anno, folder = (config.valid_anno, config.valid_images)
    for path, what in ((config.root, "folder"), (config.root / folder, "image folder")):
        if not path.is_dir():
            raise UserError(f"dataset {name!r} has no {what} {path}")
    if not (config.root / anno).is_file():
        there = ", ".join(sorted(path.name for path in config.root.glob("*.[ct]sv"))) or "none"
        raise UserError(
            f"dataset {name!r} has no annotation file {config.root / anno}; "
            f"tables in that folder: {there} (data/README.md shows the form)"
        )
    names = {str(column): own for column, own in config.columns.items()}
    table = open_csv(config.root / anno, cache_dir=cache_dir, names=names)
    return CsvSource(name, split, table, config.root / folder)
