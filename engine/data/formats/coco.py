"""Captions of COCO (https://cocodataset.org), and Karpathy's split of it and of Flickr.

    <root>/annotations/captions_train2017.json
        {"images": [{"id", "file_name"}, …], "annotations": [{"id", "image_id", "caption"}, …]}
    <root>/train2017/…    the images

or one file for all splits, in which case images are in folders that it names:

    <root>/dataset_coco.json
        {"images": [{"filepath": "val2014", "filename": "…", "split": "val", "cocoid": …,
                     "sentences": [{"raw", "sentid"}, …]}, …]}

One row is one caption.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from engine.config.schema import Section
from engine.data.tables.json_rows import read_list
from engine.data.tables.paths import annotation_file, image_folder
from engine.data.tables.source import TableSource, open_rows
from engine.data.tables.table import file_named, row_or_fault
from engine.data.tables.values import identity, malformed, mapping, required, string
from engine.errors import UserError
from engine.types import BadSample, Row

_NUM_NAMED = 20  # split names in a message


class Config(Section):
    """Options of ``format: coco``; files and folders are relative to ``root``."""

    root: Path  # relative to data.data_path; default: the dataset's name
    train_anno: str = "annotations/captions_train2017.json"
    valid_anno: str = "annotations/captions_val2017.json"
    train_images: str | None = None  # default: train2017; of a Karpathy split, root
    valid_images: str | None = None  # default: val2017; of a Karpathy split, root
    train_splits: tuple[str, ...] = ("train", "restval")  # of a Karpathy split
    valid_splits: tuple[str, ...] = ("val",)


def build(config: Config, *, name: str, split: str, cache_dir: Path) -> TableSource:
    """Open one split. Raises UserError, naming the path, for what is missing or malformed."""
    anno, folder, usual = config.train_anno, config.train_images, "train2017"
    if split == "valid":
        anno, folder, usual = config.valid_anno, config.valid_images, "val2017"
    path = annotation_file(
        config.root, anno, dataset=name, option=f"{split}_anno", endings=(".json", ".json.gz")
    )
    karpathy = _is_karpathy(path)
    if folder is None:
        folder = "." if karpathy else usual
    images = image_folder(config.root, folder, dataset=name, option=f"{split}_images")
    if karpathy:
        splits = config.valid_splits if split == "valid" else config.train_splits
        key = f"data.datasets.{name}.{split}_splits"
        options: object = ("karpathy", splits)
        rows = partial(_karpathy, path, splits, key)
    else:
        options, rows = "coco", partial(_captions, path)
    return open_rows(name, split, [path], options, rows, cache_dir=cache_dir, images=images)


def _is_karpathy(path: Path) -> bool:
    first = next(read_list(path, "images"), None)
    return first is not None and isinstance(first.value, dict) and "sentences" in first.value


def _captions(path: Path) -> Iterator[Row]:
    names = _file_names(path)
    for entry in read_list(path, "annotations"):
        yield row_or_fault(f"annotation {entry.number}", _caption, entry.value, names)


def _file_names(path: Path) -> dict[str, str]:
    """Image ids and their files. Raises UserError where one id has two."""
    names: dict[str, str] = {}
    for entry in read_list(path, "images"):
        try:
            image = mapping(entry.value, "the image")
            own = identity(required(image, "id"), "the id")
            file_name = string(required(image, "file_name"), "the file_name")
        except BadSample:  # whose annotations then name an image that is not listed
            continue
        if names.setdefault(own, file_name) != file_name:
            raise UserError(
                f"{path}, image {entry.number}: id {own[:60]!r} belongs to {names[own]!r} already"
            )
    return names


def _caption(value: Any, names: dict[str, str]) -> Row:
    annotation = mapping(value, "the annotation")
    own = identity(required(annotation, "image_id"), "the image_id")
    caption = string(required(annotation, "caption"), "the caption")
    if own not in names:
        raise BadSample("missing", f"its image {own[:60]!r} is not listed under 'images'")
    return Row(
        images=(file_named(names[own]),),
        caption=caption,
        image_id=own,
        caption_id=identity(annotation["id"], "the id") if "id" in annotation else "",
    )


def _karpathy(path: Path, splits: tuple[str, ...], key: str) -> Iterator[Row]:
    """Rows of the splits wanted. Raises UserError where the file has none of them."""
    found: set[str] = set()
    for entry in read_list(path, "images"):
        image = entry.value if isinstance(entry.value, dict) else {}
        split = image.get("split")
        if isinstance(split, str) and len(found) < _NUM_NAMED:
            found.add(split)
        if isinstance(split, str) and split not in splits:
            continue
        sentences = image.get("sentences")
        count = len(sentences) if isinstance(sentences, list) and sentences else 1
        for number in range(count):
            yield row_or_fault(f"image {entry.number}", _sentence, entry.value, number)
    if not found.intersection(splits):
        named = ", ".join(sorted(found)) or "none"
        raise UserError(f"{path} has no split {' or '.join(splits)}; its splits: {named}", key=key)


def _sentence(value: Any, number: int) -> Row:
    image = mapping(value, "the image")
    string(required(image, "split"), "the split")
    folder = string(image.get("filepath", ""), "the filepath")
    name = string(required(image, "filename"), "the filename")
    sentences = required(image, "sentences")
    if not isinstance(sentences, list):
        raise malformed("sentences", sentences, "a list")
    if not sentences:
        raise BadSample("no caption", "sentences is empty")
    sentence = mapping(sentences[number], f"sentence {number + 1}")
    own = image.get("cocoid", image.get("imgid", image.get("id")))
    return Row(
        images=(file_named(f"{folder}/{name}" if folder else name),),
        caption=string(required(sentence, "raw"), "the sentence"),
        image_id="" if own is None else identity(own, "the image's id"),
        caption_id=identity(sentence["sentid"], "the sentid") if "sentid" in sentence else "",
    )
