"""Labelled images in class folders, as ImageNet and many other sets are published.

    <root>/train/<class>/*.jpg      <root>/valid/<class>/*.jpg

or, with ``train_labels`` and ``valid_labels``, in one folder a split, with a CSV that names each
image's class:

    <root>/train/*.jpg      <root>/train_labels.csv    file,label

A class's label is its place among the sorted names of all splits' classes, so that splits agree
even where one of them lacks a class. The caption of an image is its class's name.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from engine.config.schema import Section
from engine.data.image_files import SUFFIXES
from engine.data.once import make_once
from engine.data.tables.csv_table import open_csv
from engine.data.tables.image_root import ImageRoot
from engine.data.tables.places import annotation_file
from engine.data.tables.table import Table, open_table
from engine.errors import UserError
from engine.types import BadSample, Row, Source

_LABEL_COLUMNS = {
    "image": ("image", "file", "filename", "file_name", "filepath", "image_path", "path", "id"),
    "caption": ("label", "labels", "class", "class_name", "category"),
}
_FORM = 1  # of the cached table; raised when its content changes
_ROWS = 65_536  # written at once


class Config(Section):
    """Options of ``format: imagefolder``; split folders are relative to ``root``."""

    root: Path  # relative to data.data_path; default: the dataset's name
    train: str = "train"
    valid: str = "valid"
    train_labels: str | None = None  # a CSV of files and labels, instead of class folders
    valid_labels: str | None = None


class FolderSource(Source):
    """Images of one split, class after class in sorted order; ``classes`` are the folder names."""

    def __init__(
        self, name: str, split: str, table: Table, images: Path, classes: list[str]
    ) -> None:
        self.name = name
        self.split = split
        self.table = table
        self.images = ImageRoot(images)
        self.classes: list[str] = classes

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> Row:
        """The row at ``index``; BadSample where its image is a link to another place."""
        row: dict[str, Any] = self.table.row(index)
        image, label = row["image"], row["label"]
        if label < 0:
            raise BadSample("malformed", f"row {index + 1} has not one image and one label")
        caption = self._caption(label)
        path, labels = (self.images.path(image),), (self.classes[label],)
        return Row(image, path, caption, image, str(index), label, labels=labels)

    def column(self, name: str) -> np.ndarray:
        """int64 [rows], memory-mapped: ``label`` (-1: none), or codes of ``image_id`` and
        ``caption_id``, each its own; or int32 ``length`` or ``answer_length`` of the captions."""
        if name in ("length", "answer_length"):
            return np.fromiter((len(caption) or 1 for caption in self.captions()), np.int32)
        return self.table.integers("label") if name == "label" else self.table.codes("image")

    def captions(self) -> Iterator[str]:
        """All captions in order: class names."""
        return (self._caption(int(label)) for label in self.table.values("label"))

    def _caption(self, label: int) -> str:
        return self.classes[label].replace("_", " ") if label >= 0 else ""


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
    if config.train_labels or config.valid_labels:
        return _with_labels(config, images, name=name, split=split, cache_dir=cache_dir)
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
            f"no images in the class folders of {images}; known endings: {' '.join(SUFFIXES)}",
            key=f"{at}.{split}",
        )
    return FolderSource(name, split, table, images, classes)


def _with_labels(
    config: Config, images: Path, *, name: str, split: str, cache_dir: Path
) -> FolderSource:
    """One split whose classes a CSV names; both splits' CSVs are read for their classes."""
    paths = {}
    for each, file in (("train", config.train_labels), ("valid", config.valid_labels)):
        if file is not None:
            paths[each] = annotation_file(
                config.root, file, dataset=name, option=f"{each}_labels", endings=(".csv", ".tsv")
            )
    if split not in paths:
        raise UserError(
            f"dataset {name!r} has no {split}_labels", key=f"data.datasets.{name}.{split}_labels"
        )
    inputs = [paths.pop(split), *paths.values()]
    labelled = [open_csv(path, cache_dir=cache_dir, usual=_LABEL_COLUMNS) for path in inputs]
    table = open_table(
        inputs,
        ("imagefolder", _FORM),
        lambda temporary: _write_labels(labelled, temporary),
        cache_dir=cache_dir,
    )
    return FolderSource(name, split, table, images, json.loads(table.metadata["classes"]))


def _write_labels(labelled: list[Table], target: Path) -> None:
    """Stream the (image, label) rows of the first table; classes are those of all."""
    classes = sorted({value for table in labelled for value in table.values("caption") if value})
    number = {name: label for label, name in enumerate(classes)}
    schema = pa.schema(
        [("image", pa.string()), ("label", pa.int64())], metadata={"classes": json.dumps(classes)}
    )
    rows = zip(labelled[0].values("image"), labelled[0].values("caption"), strict=True)
    with pa.OSFile(str(target), "wb") as file, pa.ipc.new_file(file, schema) as writer:
        while block := list(itertools.islice(rows, _ROWS)):
            images = [image or "" for image, _ in block]
            labels = [number.get(label, -1) if image else -1 for image, label in block]
            columns = [pa.array(images), pa.array(labels, pa.int64())]
            writer.write_batch(pa.record_batch(columns, schema=schema))


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
            if entry.name.lower().endswith(SUFFIXES) and not entry.name.startswith(".")
        )
