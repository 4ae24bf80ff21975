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
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from engine.config.schema import Section
from engine.data.cache import build_cached
from engine.data.image_files import SUFFIXES
from engine.data.tables import table as tables
from engine.data.tables.csv_table import open_csv
from engine.data.tables.paths import ImageRoot, annotation_file
from engine.data.tables.source import OneTable, TableSource
from engine.data.tables.table import Table
from engine.errors import UserError

_LABEL_COLUMNS = {
    "image": ("image", "file", "filename", "file_name", "filepath", "image_path", "path", "id"),
    "caption": ("label", "labels", "class", "class_name", "category"),
}


class Config(Section):
    """Options of ``format: imagefolder``; split folders are relative to ``root``."""

    root: Path  # relative to data.data_path; default: the dataset's name
    train: str = "train"
    valid: str = "valid"
    train_labels: str | None = None  # a CSV of files and labels, instead of class folders
    valid_labels: str | None = None


def build(config: Config, *, name: str, split: str, cache_dir: Path) -> TableSource:
    """Open one split, its images class after class in sorted order; the source's ``classes`` are
    the folders' names. Raises UserError, naming the path, for a missing folder or no images."""
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
        table = _labelled(config, name=name, split=split, cache_dir=cache_dir)
        classes = table.metadata["classes"]
    else:
        classes = sorted({p for folder in set(folders.values()) for p in _class_folders(folder)})
        if not classes:
            raise UserError(
                f"{images} holds no class folders with images in them", key=f"{at}.{split}"
            )
        table = _listed(images, classes, at, cache_dir)
    if not len(table):
        raise UserError(
            f"no images in the class folders of {images}; known endings: {' '.join(SUFFIXES)}",
            key=f"{at}.{split}",
        )
    return TableSource(name, split, OneTable(table), ImageRoot(images), classes=classes)


def _listed(images: Path, classes: list[str], at: str, cache_dir: Path) -> Table:
    """The table of the images in class folders."""
    made_of = repr((tables.FORM, images.resolve(), classes))
    state = hashlib.blake2b(made_of.encode(), digest_size=12)
    for class_name in classes:
        folder = images / class_name
        # A folder's time changes when a file comes or goes.
        stamp = folder.stat().st_mtime_ns if folder.is_dir() else 0
        state.update(f"{class_name}/{stamp}\n".encode())

    def batches() -> Iterator[pa.RecordBatch]:
        for label, class_name in enumerate(classes):
            for names in tables.chunks(_image_names(images / class_name)):
                paths = [f"{class_name}/{name}" for name in names]
                yield _columns(paths, [label] * len(names), classes)

    target = cache_dir / "imagefolder" / f"{state.hexdigest()}.arrow"
    try:
        build_cached(target, lambda temporary: tables.write_table(temporary, batches()))
    except OSError as error:
        raise UserError(f"cannot list {images} into {target}: {error}", key=at) from error
    return Table(target)


def _labelled(config: Config, *, name: str, split: str, cache_dir: Path) -> Table:
    """The table of images whose classes a CSV names; both splits' CSVs are read for theirs."""
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

    def classes() -> list[str]:
        return sorted({value for table in labelled for value in table.values("caption") if value})

    def batches() -> Iterator[pa.RecordBatch]:
        known = classes()
        number = {name: label for label, name in enumerate(known)}
        rows = zip(labelled[0].values("images"), labelled[0].values("caption"), strict=True)
        first = 1
        for chunk in tables.chunks(rows):
            paths = [images[0]["path"] if images else "" for images, _ in chunk]
            labels = [
                number.get(label) if path else None
                for path, (_, label) in zip(paths, chunk, strict=True)
            ]
            yield _columns(paths, labels, known, first)
            first += len(chunk)

    return tables.open_table(
        inputs, "imagefolder", batches, cache_dir=cache_dir, metadata=lambda: {"classes": classes()}
    )


def _columns(
    paths: list[str], labels: list[Any], classes: list[str], first: int = 1
) -> pa.RecordBatch:
    """Rows of images and their labels; without one a row is lost. The caption is the class."""
    names = [None if label is None else classes[label] for label in labels]
    lost = [label is None for label in labels]
    number = range(first, first + len(paths))
    what = "has not one image and one label"
    return tables.columns(
        images=tables.files(pa.array(paths)),
        caption=pa.array([name and name.replace("_", " ") for name in names], pa.string()),
        label=pa.array(labels, pa.int64()),
        labels=pa.array([name and [name] for name in names], pa.list_(pa.string())),
        cause=pa.array(["malformed" if bad else None for bad in lost], pa.string()),
        detail=pa.array(
            [f"row {n} {what}" if bad else None for n, bad in zip(number, lost, strict=True)],
            pa.string(),
        ),
    )


def _class_folders(split: Path) -> list[str]:
    if not split.is_dir():
        return []
    with os.scandir(split) as entries:
        return [e.name for e in entries if e.is_dir() and not e.name.startswith(".")]


def _image_names(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        return sorted(
            entry.name
            for entry in entries
            if entry.name.lower().endswith(SUFFIXES) and not entry.name.startswith(".")
        )
