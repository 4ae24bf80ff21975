"""Labelled images in class folders, as ImageNet and many other sets are published.

    <root>/train/<class>/*.jpg      <root>/valid/<class>/*.jpg

or, with ``train_labels`` and ``valid_labels``, in one folder a split, with a CSV that names each
image's class:

    <root>/train/*.jpg      <root>/train_labels.csv    file,label

A class's label is its place among the sorted names of all splits' classes, so that splits agree
even where one of them lacks a class. The caption of an image is its class's name.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import pyarrow as pa

from engine.data.image_files import SUFFIXES, images_in
from engine.data.tables.csv_table import open_csv
from engine.data.tables.paths import FolderOptions, ImageRoot, SplitFolder
from engine.data.tables.source import TableSource, open_rows
from engine.data.tables.table import Table, file_named
from engine.types import Row

_LABEL_COLUMNS = {
    "image": ("image", "file", "filename", "file_name", "filepath", "image_path", "path", "id"),
    "caption": ("label", "labels", "class", "class_name", "category"),
}


class Config(FolderOptions):
    """Options of ``format: imagefolder``; split folders are relative to ``root``."""

    train: str = "train"
    valid: str = "valid"
    train_labels: str | None = None  # a CSV of files and labels, instead of class folders
    valid_labels: str | None = None


def build(config: Config, *, name: str, split: str, cache_dir: Path) -> TableSource:
    """Open one split, its images class after class in sorted order; the source's ``classes`` are
    the folders' names. Raises UserError, naming the path, for a missing folder or no images."""
    folder = SplitFolder(config, name, split)
    images = config.root / folder.of(config.train, config.valid)
    if not images.is_dir():
        there = ", ".join(sorted(_folders(config.root))) or "none"
        raise folder.error(
            f"has no folder {images} for {split} images; folders in {config.root}: {there}. "
            f"Name one as {split}: FOLDER",
            split,
        )
    rows: Callable[[], Iterator[Row]]
    if config.train_labels or config.valid_labels:
        inputs, tables = _labels(config, folder, cache_dir)
        named = pa.chunked_array([batch for each in tables for batch in each.column("caption")])
        classes = sorted(filter(None, named.unique().to_pylist()))
        options: object = "imagefolder"
        rows = partial(_labelled, tables[0], classes)
    else:
        both = {config.root / config.train, config.root / config.valid}
        classes = sorted({name for each in both if each.is_dir() for name in _folders(each)})
        if not classes:
            raise folder.error(f"holds no class folders with images in them: {images}", split)
        # A folder's time changes when a file comes or goes.
        inputs = [images, *(path for each in classes if (path := images / each).is_dir())]
        options = ("imagefolder", classes)
        rows = partial(_listed, images, classes, folder)
    source = open_rows(
        name, split, inputs, options, rows, cache_dir=cache_dir, images=ImageRoot(images)
    )
    source.classes = classes
    return source


def _folders(parent: Path) -> list[str]:
    with os.scandir(parent) as entries:
        return [e.name for e in entries if e.is_dir() and not e.name.startswith(".")]


def _row(path: str, label: int, classes: Sequence[str]) -> Row:
    """The caption is the class."""
    name = classes[label]
    caption = name.replace("_", " ")
    return Row(images=(file_named(path),), caption=caption, label=label, labels=(name,))


def _listed(images: Path, classes: Sequence[str], folder: SplitFolder) -> Iterator[Row]:
    """The images in class folders."""
    found = False
    for label, name in enumerate(classes):
        for image in images_in(images / name) if (images / name).is_dir() else ():
            found = True
            yield _row(f"{name}/{image}", label, classes)
    if not found:
        known = " ".join(SUFFIXES)
        what = f"has no images in the class folders of {images}; known endings: {known}"
        raise folder.error(what, folder.split)


def _labels(config: Config, folder: SplitFolder, cache_dir: Path) -> tuple[list[Path], list[Table]]:
    """The CSVs of both splits, whose classes are counted together: the split's own is the first."""
    files = {"train": config.train_labels, "valid": config.valid_labels}
    if not files[folder.split]:
        raise folder.error(f"has no {folder.split}_labels", f"{folder.split}_labels")
    paths = [
        SplitFolder(config, folder.dataset, split).file(file, "labels", ".csv", ".tsv")
        for split, file in sorted(files.items(), key=lambda each: each[0] != folder.split)
        if file
    ]
    return paths, [open_csv(path, cache_dir=cache_dir, usual=_LABEL_COLUMNS) for path in paths]


def _labelled(table: Table, classes: Sequence[str]) -> Iterator[Row]:
    """The images that a CSV gives classes; a row without an image or a label is lost."""
    numbers = {name: label for label, name in enumerate(classes)}
    rows = zip(table.values("images"), table.values("caption"), strict=True)
    for number, (images, name) in enumerate(rows, 1):
        path = images[0]["path"] if images else ""
        if path and name:
            yield _row(path, numbers[name], classes)
        else:
            yield Row(
                images=(file_named(path),),
                cause="malformed",
                detail=f"row {number} has not one image and one label",
            )
