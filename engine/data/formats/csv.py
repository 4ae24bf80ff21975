"""A folder with an annotation CSV and an image folder for each split (the form of ZeroVL).

The folder ``root`` holds

    <root>/train_anno.csv  valid_anno.csv    image,image_id,caption,caption_id
    <root>/train/…  valid/…                  the images

Columns ``question``, ``answers``, ``question_type``, ``answer_type`` and ``labels`` are read where
a file has them.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from engine.data.tables.csv_table import Column, open_csv
from engine.data.tables.paths import FolderOptions, SplitFolder
from engine.data.tables.source import Tables, TableSource


class Config(FolderOptions):
    """Options of ``format: csv``; files and folders are relative to ``root``."""

    train_anno: str = "train_anno.csv"
    valid_anno: str = "valid_anno.csv"
    train_images: str = "train"
    valid_images: str = "valid"
    columns: dict[Column, str] = Field(default={})  # the CSV's own names, where unusual


def build(config: Config, *, name: str, split: str, cache_dir: Path) -> TableSource:
    """Open one split. Raises UserError, naming the path, for what is missing or malformed."""
    folder = SplitFolder(config, name, split)
    images = folder.images(folder.of(config.train_images, config.valid_images))
    names = {str(column): own for column, own in config.columns.items()}
    path = folder.file(folder.of(config.train_anno, config.valid_anno), "anno", ".csv", ".tsv")
    table = open_csv(path, cache_dir=cache_dir, names=names)
    return TableSource(name, split, Tables(table), images)
