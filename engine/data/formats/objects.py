"""What is in images, from JSON: lists of labels, or the boxes of COCO's detection.

    <root>/train_labels.json      [{"image": "a.jpg", "labels": ["dog", "cat"]}, …], or such a line
                                  an image (.jsonl)
    <root>/annotations/instances_train2017.json
                                  {"images": [{"id", "file_name"}, …],
                                   "annotations": [{"image_id", "category_id"}, …],
                                   "categories": [{"id", "name"}, …]}
    <root>/train2017/…            the images

One row is one image. Of boxes, each kind of object is a label once, crowds too; an image without
any has no label.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from engine.config.schema import Section
from engine.data.tables.json_rows import read_list, read_rows
from engine.data.tables.paths import annotation_file, image_folder
from engine.data.tables.source import TableSource, open_rows
from engine.data.tables.table import file_named, row_or_fault
from engine.data.tables.values import identity, mapping, optional_id, required, string, strings
from engine.errors import UserError
from engine.types import BadSample, Row


class Config(Section):
    """Options of ``format: objects``; files and folders are relative to ``root``."""

    root: Path  # relative to data.data_path; default: the dataset's name
    train_anno: str = "annotations/instances_train2017.json"
    valid_anno: str = "annotations/instances_val2017.json"
    train_images: str = "train2017"
    valid_images: str = "val2017"


def build(config: Config, *, name: str, split: str, cache_dir: Path) -> TableSource:
    """Open one split. Raises UserError, naming the path, for what is missing or malformed."""
    anno, folder = config.train_anno, config.train_images
    if split == "valid":
        anno, folder = config.valid_anno, config.valid_images
    path = annotation_file(
        config.root, anno, dataset=name, option=f"{split}_anno",
        endings=(".json", ".jsonl", ".json.gz"),
    )  # fmt: skip
    images = image_folder(config.root, folder, dataset=name, option=f"{split}_images")
    rows = partial(_rows, path)
    return open_rows(name, split, [path], "objects", rows, cache_dir=cache_dir, images=images)


def _rows(path: Path) -> Iterator[Row]:
    if _is_detection(path):
        yield from _detection(path)
        return
    for entry in read_rows(path):
        if entry.fault is not None:
            yield Row(cause="malformed", detail=f"entry {entry.number}: {entry.fault}")
        else:
            yield row_or_fault(f"entry {entry.number}", _listed, entry.value)


def _is_detection(path: Path) -> bool:
    """Whether the file is one object, and not a list or lines. Raises UserError."""
    if ".jsonl" in path.suffixes:
        return False
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8-sig", errors="replace") as file:
            return file.read(256).lstrip()[:1] == "{"
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def _listed(value: Any) -> Row:
    entry = mapping(value, "the entry")
    labels = required(entry, "labels")
    given = labels.split("|") if isinstance(labels, str) else strings(labels, "labels")
    image = string(required(entry, "image"), "the image")
    return _row(image, optional_id(entry, "image_id"), tuple(given))


def _row(image: str, image_id: str, labels: tuple[str, ...]) -> Row:
    if not any(label.strip() for label in labels):
        raise BadSample("no label", f"{image} has none")
    images, caption = (file_named(image),), ", ".join(labels)
    return Row(images=images, caption=caption, image_id=image_id, labels=labels)


def _detection(path: Path) -> Iterator[Row]:
    """Raises UserError where one category has two names."""
    names: dict[str, str] = {}
    for entry in read_list(path, "categories"):
        category = mapping(entry.value, "the category")
        own = identity(required(category, "id"), "the id")
        kind = string(required(category, "name"), "the name")
        if names.setdefault(own, kind) != kind:
            raise UserError(f"{path}, category {entry.number}: id {own!r} is {names[own]!r} too")
    shown: dict[str, dict[str, None]] = {}  # kinds by image, each once, in the order of boxes
    for entry in read_list(path, "annotations"):
        try:
            box = mapping(entry.value, "the annotation")
            image = identity(required(box, "image_id"), "the image_id")
            kind = identity(required(box, "category_id"), "the category_id")
        except BadSample:  # whose image is not known
            continue
        shown.setdefault(image, {})[names.get(kind, "")] = None
    for entry in read_list(path, "images"):
        yield row_or_fault(f"image {entry.number}", _detected, entry.value, shown)


def _detected(value: Any, shown: dict[str, dict[str, None]]) -> Row:
    image = mapping(value, "the image")
    own = identity(required(image, "id"), "the id")
    name = string(required(image, "file_name"), "the file_name")
    return _row(name, own, tuple(kind for kind in shown.get(own, {}) if kind))
