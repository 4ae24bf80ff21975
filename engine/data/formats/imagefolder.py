"""Labelled images in class folders, as ImageNet and many other sets are published.

    <root>/train/<class>/*.jpg      <root>/valid/<class>/*.jpg

A class's label is its place among the sorted names of all splits' class folders, so that splits
agree even where one of them lacks a class. The caption of an image is its class's name.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from engine.config.schema import Section
from engine.data.once import make_once
from engine.data.table import Table
from engine.errors import UserError
from engine.types import BadSample, Record

_SUFFIXES = (
    ".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".ppm", ".tif", ".tiff", ".avif", ".jp2"
)  # fmt: skip
_FORM = 1  # of the cached table; raised when its content changes
_ROWS = 65_536  # written at once


class Config(Section):
    """Options of ``format: imagefolder``; split folders are relative to ``root``."""

    root: Path  # relative to data.data_path; default: the dataset's name
    train: str = "train"
    valid: str = "valid"


class FolderSource:
    """Images of one split, class after class in sorted order; ``classes`` are the folder names."""

    def __init__(
        self, name: str, split: str, table: Table, images: Path, classes: list[str]
    ) -> None:
        self.name = name
        self.split = split
        self.table = table
        self.images = images
        self.classes = classes
        self._root = os.path.realpath(images) + os.sep

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> Record:
        """The row at ``index``; BadSample where its image is a link to another place."""
        row: dict[str, Any] = self.table.row(index)
        path = self.images / row["image"]
        if not os.path.realpath(path).startswith(self._root):
            raise BadSample("outside root", f"{path} is a link to {path.resolve()}")
        label = row["label"]
        return Record(row["image"], path, self._caption(label), row["image"], str(index), label)

    def column(self, name: str) -> np.ndarray:
        """int64 [rows]: ``label``, or codes of ``image_id`` and ``caption_id`` (each its own)."""
        if name == "label":
            return np.fromiter(self.table.values("label"), np.int64, len(self))
        return np.arange(len(self))

    def captions(self) -> Iterator[str]:
        """All captions in order: class names."""
        return (self._caption(int(label)) for label in self.table.values("label"))

    def _caption(self, label: int) -> str:
        return self.classes[label].replace("_", " ")


def build(config: Config, *, name: str, split: str, cache_dir: Path) -> FolderSource:
    """Open one split. Raises UserError, naming the path, for a missing folder or no images."""
    folders = {"train": config.root / config.train, "valid": config.root / config.valid}
    images = folders[split]
    at = f"data.datasets.{name}"
    if not config.root.is_dir():
        raise UserError(f"dataset {name!r} has no folder {config.root}", key=f"{at}.root")
    if not images.is_dir():
        there = ", ".join(sorted(p.name for p in config.root.iterdir() if p.is_dir())) or "none"
        raise UserError(
            f"dataset {name!r} has no folder {images} for {split} images; folders in "
            f"{config.root}: {there}. Name one as {split}: FOLDER",
            key=f"{at}.{split}",
        )
    classes = sorted({p for folder in set(folders.values()) for p in _class_folders(folder)})
    if not classes:
        raise UserError(f"{images} holds no class folders with images in them", key=f"{at}.{split}")
    state = hashlib.blake2b(repr((_FORM, images.resolve(), classes)).encode(), digest_size=12)
    for class_name in classes:
        folder = images / class_name
        # A folder's time changes when a file comes or goes.
        stamp = folder.stat().st_mtime_ns if folder.is_dir() else 0
        state.update(f"{class_name}/{stamp}\n".encode())
    target = cache_dir / "imagefolder" / f"{state.hexdigest()}.arrow"
    try:
        make_once(target, lambda temporary: _write(images, classes, temporary))
    except OSError as error:
        raise UserError(f"cannot list {images} into {target}: {error}", key=at) from error
    table = Table(target)
    if not len(table):
        raise UserError(
            f"no images in the class folders of {images}; known endings: {' '.join(_SUFFIXES)}",
            key=f"{at}.{split}",
        )
    return FolderSource(name, split, table, images, classes)


def _class_folders(split: Path) -> list[str]:
    if not split.is_dir():
        return []
    with os.scandir(split) as entries:
        return [e.name for e in entries if e.is_dir() and not e.name.startswith(".")]


def _write(images: Path, classes: list[str], target: Path) -> None:
    """Stream (image, label) rows into an Arrow file."""
    schema = pa.schema([("image", pa.string()), ("label", pa.int64())])
    with pa.OSFile(str(target), "wb") as file, pa.ipc.new_file(file, schema) as writer:
        for label, class_name in enumerate(classes):
            names = _image_names(images / class_name)
            for start in range(0, len(names), _ROWS):
                paths = [f"{class_name}/{name}" for name in names[start : start + _ROWS]]
                labels = pa.array([label] * len(paths), pa.int64())
                writer.write_batch(pa.record_batch([pa.array(paths), labels], schema=schema))


def _image_names(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        return sorted(
            entry.name
            for entry in entries
            if entry.name.lower().endswith(_SUFFIXES) and not entry.name.startswith(".")
        )
