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

from engine.data.tables.json_rows import Entry, read_list, read_names, rows_of
from engine.data.tables.paths import FolderOptions, SplitFolder
from engine.data.tables.source import TableSource, open_rows
from engine.data.tables.table import file_named, row_or_fault
from engine.data.tables.values import identity, malformed, mapping, required, string
from engine.errors import UserError
from engine.types import BadSample, Row

_NUM_NAMED = 20  # split names in a message


class Config(FolderOptions):
    """Options of ``format: coco``; files and folders are relative to ``root``."""

    train_anno: str = "annotations/captions_train2017.json"
    valid_anno: str = "annotations/captions_val2017.json"
    train_images: str | None = None  # default: train2017; of a Karpathy split, root
    valid_images: str | None = None  # default: val2017; of a Karpathy split, root
    train_splits: tuple[str, ...] = ("train", "restval")  # of a Karpathy split
    valid_splits: tuple[str, ...] = ("val",)


def build(config: Config, *, name: str, split: str, cache_dir: Path) -> TableSource:
    """Open one split. Raises UserError, naming the path, for what is missing or malformed."""
    folder = SplitFolder(config, name, split)
    path = folder.file(folder.of(config.train_anno, config.valid_anno), "anno", ".json", ".json.gz")
    first = next(read_list(path, "images"), None)
    options: object = "coco"
    rows, usual = partial(_captions, path), folder.of("train2017", "val2017")
    if first is not None and isinstance(first.value, dict) and "sentences" in first.value:
        splits = folder.of(config.train_splits, config.valid_splits)
        options = ("karpathy", splits)
        rows, usual = partial(_karpathy, path, splits, f"data.datasets.{name}.{split}_splits"), "."
    given = folder.of(config.train_images, config.valid_images)
    images = folder.images(usual if given is None else given)
    return open_rows(name, split, [path], options, rows, cache_dir=cache_dir, images=images)


def _captions(path: Path) -> Iterator[Row]:
    # Annotations of images that are left out here name one that is not listed.
    names = read_names(path, "images", "image", "file_name")
    return rows_of(read_list(path, "annotations"), "annotation", _caption, names)


def _caption(entry: Entry, names: dict[str, str]) -> Row:
    annotation = entry.object("the annotation")
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
        if isinstance(split, str):
            if len(found) < _NUM_NAMED:
                found.add(split)
            if split not in splits:
                continue
        sentences = image.get("sentences")
        count = len(sentences) if isinstance(sentences, list) and sentences else 1
        for number in range(count):
            yield row_or_fault(f"image {entry.number}", _sentence, entry, number)
    if not found.intersection(splits):
        named = ", ".join(sorted(found)) or "none"
        raise UserError(f"{path} has no split {' or '.join(splits)}; its splits: {named}", key=key)


def _sentence(entry: Entry, number: int) -> Row:
    image = entry.object("the image")
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
