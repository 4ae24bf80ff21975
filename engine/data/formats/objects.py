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

from collections.abc import Iterator
from pathlib import Path

from engine.data.tables.json_rows import (
    Entry,
    is_object,
    read_list,
    read_names,
    read_rows,
    rows_of,
)
from engine.data.tables.paths import FolderOptions, SplitFolder
from engine.data.tables.source import TableSource, open_rows
from engine.data.tables.table import file_named
from engine.data.tables.values import identity, optional_id, required, string, strings
from engine.types import BadSample, Row


class Config(FolderOptions):
    """Options of ``format: objects``; files and folders are relative to ``root``."""

    train_anno: str = "annotations/instances_train2017.json"
    valid_anno: str = "annotations/instances_val2017.json"
    train_images: str = "train2017"
    valid_images: str = "val2017"


def build(config: Config, *, name: str, split: str, cache_dir: Path) -> TableSource:
    """Open one split. Raises UserError, naming the path, for what is missing or malformed."""
    folder = SplitFolder(config, name, split)
    anno = folder.of(config.train_anno, config.valid_anno)
    path = folder.file(anno, "anno", ".json", ".jsonl", ".json.gz")
    images = folder.images(folder.of(config.train_images, config.valid_images))
    in_boxes = ".jsonl" not in path.suffixes and is_object(path)

    def rows() -> Iterator[Row]:
        return _detection(path) if in_boxes else rows_of(read_rows(path), "entry", _listed)

    return open_rows(name, split, [path], "objects", rows, cache_dir=cache_dir, images=images)


def _listed(entry: Entry) -> Row:
    value = entry.object("the entry")
    labels = required(value, "labels")
    given = labels.split("|") if isinstance(labels, str) else strings(labels, "labels")
    image = string(required(value, "image"), "the image")
    return _row(image, optional_id(value, "image_id"), tuple(given))


def _row(image: str, image_id: str, labels: tuple[str, ...]) -> Row:
    if not any(label.strip() for label in labels):
        raise BadSample("no label", f"{image} has none")
    images, caption = (file_named(image),), ", ".join(labels)
    return Row(images=images, caption=caption, image_id=image_id, labels=labels)


def _detection(path: Path) -> Iterator[Row]:
    names = read_names(path, "categories", "category", "name", strict=True)
    shown: dict[str, dict[str, None]] = {}  # kinds by image, each once, in the order of boxes
    for entry in read_list(path, "annotations"):
        try:
            box = entry.object("the annotation")
            image = identity(required(box, "image_id"), "the image_id")
            kind = identity(required(box, "category_id"), "the category_id")
        except BadSample:  # whose image is not known
            continue
        shown.setdefault(image, {})[names.get(kind, "")] = None
    yield from rows_of(read_list(path, "images"), "image", _detected, shown)


def _detected(entry: Entry, shown: dict[str, dict[str, None]]) -> Row:
    image = entry.object("the image")
    own = identity(required(image, "id"), "the id")
    name = string(required(image, "file_name"), "the file_name")
    return _row(name, own, tuple(kind for kind in shown.get(own, {}) if kind))
