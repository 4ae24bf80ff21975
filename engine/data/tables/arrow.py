"""Arrow stream files of images and texts, whatever their columns are called, as rows.

Images are bytes, base64 texts, structs ``{bytes, path}``, paths, or lists of these. Those that are
in the file are noted by their places in it, which needs record batches that are not compressed.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from engine.data.cache import cached_file
from engine.data.tables.paths import FolderOptions, SplitFolder
from engine.data.tables.source import TableSource, open_rows
from engine.data.tables.table import file_named, row_or_fault
from engine.data.tables.values import (
    Several,
    answers,
    caption_of,
    chosen_images,
    conversation,
    instruction,
    lacks,
    optional_id,
    optional_text,
    own_names,
    string,
    strings,
)
from engine.errors import UserError
from engine.types import BadSample, Place, Row

USUAL_NAMES = {
    "image": (
        "image", "images", "img", "jpg", "jpeg", "png", "webp", "image_bytes", "bytes",
        "image_base64_str", "image_base64", "image_str",
        "filepath", "file_path", "file_name", "filename", "image_path", "path",
    ),
    "image_id": ("image_id", "cocoid", "imgid"),
    "caption": ("caption", "captions", "text", "txt", "title", "sentences"),
    "caption_id": ("caption_id",),
    "question": ("question",),
    "question_type": ("question_type",),
    "answer_type": ("answer_type",),
    "answers": ("answers", "answer"),
    "labels": ("labels",),
    "label": ("label",),
    "conversations": ("conversations", "messages"),
    "instruction": ("instruction",),
    "inputs": ("inputs", "input"),
    "outputs": ("outputs", "output"),
}  # fmt: skip
TEXTS = ("caption", "question", "conversations", "outputs", "labels", "label")
Column = Literal[
    "image", "image_id", "caption", "caption_id", "question", "answers", "labels", "label",
    "conversations", "instruction", "inputs", "outputs", "question_type", "answer_type",
]  # fmt: skip


class TableOptions(FolderOptions):
    """Options of every table; files and folders are relative to ``root``."""

    images: str = "."  # where paths are looked up
    columns: dict[Column, str] = Field(default={})  # the table's own names, where unusual
    base64: bool | None = None  # text in the image column; default: by the column's name
    several_images: Several = "first"  # of a cell with more than one


@dataclass(frozen=True)
class Columns:
    """Which of a table's columns hold what, and whether image cells are texts in base64."""

    own: Mapping[str, str]
    base64: bool
    several: Several = "first"  # of a cell with more than one image


def choose_columns(schema: pa.Schema, where: Path, options: TableOptions) -> Columns:
    """The columns to read. Raises UserError, naming those found, where one is missing."""
    names = {str(column): theirs for column, theirs in options.columns.items()}
    own = own_names(schema.names, names, USUAL_NAMES, where)
    if not set(TEXTS).intersection(own):
        wanted = ", ".join(USUAL_NAMES[text][0] for text in TEXTS)
        raise lacks(where, f"none of the columns {wanted}", schema.names)
    if not {"image", "conversations", "outputs"}.intersection(own):
        wanted = " or ".join(USUAL_NAMES["image"])
        raise lacks(where, f"no column for the image ({wanted})", schema.names)
    base64, image = options.base64, own.get("image", "")
    if base64 is None:
        base64 = image == "image_str" or "base64" in image
    return Columns(own, base64, options.several_images)


def open_arrow(
    folder: SplitFolder,
    paths: Sequence[Path],
    schema: pa.Schema,
    streamed: Callable[[Path, Columns], Path],
    *,
    cache_dir: Path,
) -> TableSource:
    """A split of tables, each of which ``streamed`` makes an Arrow stream of: itself or a copy.

    ``schema`` is the first one's. Raises UserError.
    """
    options = folder.config
    assert isinstance(options, TableOptions)
    columns = choose_columns(schema, paths[0], options)
    files = [streamed(path, columns) for path in paths]
    return open_rows(
        folder.dataset,
        folder.split,
        paths,
        ("arrow", columns),
        lambda: read_rows(paths, files, columns),
        cache_dir=cache_dir,
        images=folder.images(options.images, "images"),
        held_in=files,
        base64=columns.base64,
    )


def read_rows(names: Sequence[Path], paths: Sequence[Path], columns: Columns) -> Iterator[Row]:
    """One row a caption of the files' rows, which messages call by their ``names``.

    Raises UserError for a file that cannot be read.
    """
    number = 0
    for name, path in zip(names, paths, strict=True):
        classes = _class_names(open_stream(path)[1], columns)
        for data, batch in read_batches(path):
            missing = [own for own in columns.own.values() if own not in batch.schema.names]
            if missing:
                raise UserError(f"{path} has no column {missing[0]!r}, as {paths[0]} has")
            cells = {
                column: batch.column(own).to_pylist()
                for column, own in columns.own.items()
                if column != "image"
            }
            for place, images in enumerate(_images(batch, columns, path, data)):
                number += 1
                values = {column: listed[place] for column, listed in cells.items()}
                where = f"{name.name} row {number}"
                own = values, images, columns.several, classes, number
                for caption in _captions(values):
                    yield row_or_fault(where, _row, caption, *own)


def open_stream(path: Path) -> tuple[pa.Buffer, pa.Schema, int]:
    """A mapped Arrow stream file: its bytes, its schema and the offset of its first record batch.

    Raises UserError for any other file.
    """
    try:
        with pa.memory_map(str(path)) as file:
            data = file.read_buffer()
        reader = pa.BufferReader(data)
        schema = pa.ipc.read_schema(pa.ipc.read_message(reader))
    except (pa.ArrowException, EOFError, OSError) as error:
        raise UserError(f"cannot read {path} as an Arrow stream: {error}") from error
    if nested := next((f.name for f in schema if pa.types.is_dictionary(f.type)), None):
        raise UserError(f"column {nested!r} of {path} is dictionary-encoded, which is not read")
    return data, schema, reader.tell()


def read_batches(path: Path) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Row batches of an Arrow stream file, checked, each with its offset in bytes.

    Raises UserError, naming the file and the offset, for what is truncated or corrupt.
    """
    data, schema, offset = open_stream(path)
    while offset < len(data):
        try:
            batch, end = _batch_at(data, schema, offset)
            if batch is not None:
                batch.validate(full=True)
        except (pa.ArrowException, EOFError, OSError) as error:
            raise UserError(f"{path} is corrupt at byte {offset}: {error}") from error
        if batch is None:
            return
        yield data, batch
        offset = end
    raise UserError(f"{path} is cut off: an Arrow stream ends with a mark")


def _batch_at(data: pa.Buffer, schema: pa.Schema, offset: int) -> tuple[pa.RecordBatch | None, int]:
    """The batch at an offset and where it ends; no batch at the stream's end."""
    reader = pa.BufferReader(data.slice(offset))
    try:
        message = pa.ipc.read_message(reader)
    except EOFError:
        return None, offset
    return pa.ipc.read_record_batch(message, schema), offset + reader.tell()


def uncompressed(path: Path, *, cache_dir: Path) -> Path:
    """An Arrow stream file itself, or a copy of it without compression. Raises UserError."""
    data, schema, offset = open_stream(path)
    try:
        batch = _batch_at(data, schema, offset)[0]
    except (pa.ArrowException, EOFError, OSError):  # named where its rows are read
        return path
    held = [buffer for column in batch or () for buffer in column.buffers() if buffer is not None]
    if all(0 <= buffer.address - data.address <= len(data) for buffer in held):
        return path

    def write(temporary: Path) -> None:
        with pa.ipc.new_stream(str(temporary), schema) as writer:
            for _, each in read_batches(path):
                writer.write_batch(each)

    return cached_file([path], "uncompressed", write, cache_dir=cache_dir, ending="arrows")


def holds_bytes(schema: pa.Schema, columns: Columns) -> bool:
    """Whether image cells hold images, rather than paths of files."""
    if "image" not in columns.own:
        return False
    return columns.base64 or not _is_text(_inner(schema.field(columns.own["image"]).type))


def _inner(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_list(kind) or pa.types.is_large_list(kind) else kind


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _is_wide(kind: pa.DataType) -> bool:
    return pa.types.is_large_binary(kind) or pa.types.is_large_string(kind)


_Cell = list[Any]
"""The images of a cell: their paths or their places, None for one that is not there."""


def _images(
    batch: pa.RecordBatch, columns: Columns, path: Path, data: pa.Buffer
) -> Iterator[_Cell]:
    if "image" not in columns.own:
        return iter([[]] * batch.num_rows)
    cells = batch.column(columns.own["image"])
    if _inner(cells.type) is not cells.type:
        each = _each(cells.values, columns, path, data, named=False)
        bounds = cells.offsets.to_pylist()
        return (each[first:end] for first, end in itertools.pairwise(bounds))
    return ([] if one is None else [one] for one in _each(cells, columns, path, data))


def _each(
    cells: pa.Array, columns: Columns, path: Path, data: pa.Buffer, *, named: bool = True
) -> _Cell:
    """The image of each cell; one without bytes is its path's where images are ``named``."""
    if _is_text(cells.type) and not columns.base64:
        return cells.to_pylist()
    names = [None] * len(cells)
    if pa.types.is_struct(cells.type):
        fields = [field.name for field in cells.type]
        if "path" in fields and named:
            names = pc.struct_field(cells, "path").to_pylist()
        if "bytes" not in fields:
            return names
        cells = pc.struct_field(cells, "bytes")
    found = zip(_byte_places(cells, path, data), names, strict=True)
    return [own if place is None else Place(str(path), *place, own or "") for place, own in found]


def _byte_places(cells: pa.Array, path: Path, data: pa.Buffer) -> list[tuple[int, int] | None]:
    """Offset and size in the file ``data`` of each cell's bytes; None for cells without any."""
    if cells.null_count == len(cells):
        return [None] * len(cells)
    if not (_is_text(cells.type) or pa.types.is_binary(cells.type) or _is_wide(cells.type)):
        raise UserError(f"images of {path} are of type {cells.type}, not bytes, texts or paths")
    _, bounds, content = cells.buffers()
    kind = np.int64 if _is_wide(cells.type) else np.int32
    ends = np.frombuffer(bounds, kind)[cells.offset :][: len(cells) + 1]
    start = content.address - data.address
    if not 0 <= start <= len(data):
        raise UserError(f"images of {path} cannot be read from their places: it is compressed")
    pairs = zip((ends[:-1] + start).tolist(), np.diff(ends).tolist(), strict=True)
    valid = cells.is_valid().to_pylist()
    return [pair if there else None for pair, there in zip(pairs, valid, strict=True)]


def _class_names(schema: pa.Schema, columns: Columns) -> list[str]:
    """Names of the classes that an integer label counts, where the file says them."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return [str(name) for name in features[columns.own["label"]]["names"]]
    except (KeyError, TypeError, ValueError, RecursionError):
        return []


def _captions(values: Mapping[str, Any]) -> list[Any]:
    """The captions of a table's row, each of which makes a row of its own."""
    given = values.get("caption")
    return (given or [""]) if isinstance(given, list) else [given]


def _row(
    caption: Any,
    values: Mapping[str, Any],
    images: _Cell,
    several: Several,
    classes: list[str],
    number: int,
) -> Row:
    chosen = chosen_images(tuple(images), several)
    held = any(isinstance(image, Place) for image in images)
    if None in chosen and not any(isinstance(image, str) for image in images):
        raise BadSample("missing", "the cell holds no image")
    own: dict[str, Any] = {
        name: optional_text(values, name) for name in ("question_type", "answer_type")
    }
    own |= {name: optional_id(values, name) for name in ("image_id", "caption_id")}
    if values.get("question") is not None:
        own["question"] = string(values["question"], "the question")
    own["answers"] = answers(values.get("answers"))
    if "conversations" in values:
        own["turns"] = conversation(values["conversations"])
    elif "instruction" in values and "outputs" in values:
        output = values["outputs"]
        if isinstance(output, list) and len(output) == 1:
            output = output[0]
        own["turns"] = instruction(values["instruction"], values.get("inputs"), output)
    labels, label = strings(values.get("labels"), "labels"), values.get("label")
    if isinstance(label, int) and 0 <= label < 1 << 31:
        own["label"], labels = label, labels or tuple(classes[label : label + 1])
    elif isinstance(label, str):
        labels = labels or (label,)
    if held and values.get("image_id") is None:  # many tables name the images in them all alike
        own["image_id"] = str(number - 1)
    row = Row(
        images=tuple(
            image if isinstance(image, Place) else file_named(string(image, "the path"))
            for image in chosen
        ),
        labels=labels,
        **own,
    )
    if "caption" not in values:
        return replace(row, caption=caption_of(row))
    if isinstance(caption, dict):  # a sentence of a Karpathy split
        caption = caption.get("raw")
    return replace(row, caption=string(caption, "the caption"))
