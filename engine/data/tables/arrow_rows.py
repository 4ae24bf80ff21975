"""Rows of Arrow stream files, whatever their columns are called, as rows of annotations."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from engine.data.tables.annotations import Row, row_or_fault
from engine.data.tables.arrow_images import open_stream, read_batches
from engine.data.tables.fields import (
    answers,
    chosen_images,
    conversation,
    identity,
    instruction,
    string,
    strings,
)
from engine.errors import UserError

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
_NUM_NAMED = 40  # columns in a message


@dataclass(frozen=True)
class Columns:
    """Which of a table's columns hold what, and whether image cells are texts in base64."""

    own: Mapping[str, str]
    base64: bool
    several: str = "first"  # of a cell with more than one image: "first", "all" or "refuse"


def choose_columns(
    schema: pa.Schema, where: Path, names: Mapping[str, str], base64: bool | None, several: str
) -> Columns:
    """The columns to read. Raises UserError, naming those found, where one is missing.

    ``base64`` None: as the image column's name has it.
    """
    own = {}
    listed = schema.names[:_NUM_NAMED]
    found = ", ".join(listed) + (", …" if len(schema.names) > len(listed) else "") or "none"
    for column, usual in USUAL_NAMES.items():
        # A column that the user gives one meaning has no other by its name, but the image's may be
        # its id.
        free = tuple(n for n in usual if column == "image" or n not in names.values())
        wanted = (names[column],) if column in names else free
        name = next((name for name in wanted if name in schema.names), None)
        if name is not None:
            own[column] = name
        elif column in names:
            raise UserError(f"{where} has no column {wanted[0]!r}; its columns are: {found}")
    if not set(TEXTS).intersection(own):
        usual_texts = ", ".join(USUAL_NAMES[text][0] for text in TEXTS)
        raise UserError(f"{where} has none of the columns {usual_texts}; its columns are: {found}")
    if "image" not in own and not {"conversations", "outputs"}.intersection(own):
        raise UserError(
            f"{where} has no column for the image ({' or '.join(USUAL_NAMES['image'])}); "
            f"its columns are: {found}"
        )
    if base64 is None:
        base64 = own.get("image", "") == "image_str" or "base64" in own.get("image", "")
    return Columns(own, base64, several)


def holds_bytes(schema: pa.Schema, columns: Columns) -> bool:
    """Whether image cells hold images, rather than paths of files."""
    if "image" not in columns.own:
        return False
    return columns.base64 or not _is_text(_inner(schema.field(columns.own["image"]).type))


def read_rows(paths: Sequence[Path], columns: Columns) -> Iterator[Row]:
    """One row a caption of the files' rows. Raises UserError for a file that cannot be read."""
    number = 0
    for file, path in enumerate(paths):
        names = _class_names(open_stream(path)[1], columns)
        for offset, batch in read_batches(path):
            missing = [own for own in columns.own.values() if own not in batch.schema.names]
            if missing:
                raise UserError(f"{path} has no column {missing[0]!r}, as {paths[0]} has")
            cells = {
                column: batch.column(own).to_pylist()
                for column, own in columns.own.items()
                if column != "image"
            }
            for extent, image in enumerate(_images(batch, columns)):
                number += 1
                values = {column: listed[extent] for column, listed in cells.items()}
                place = (file, offset, extent) if image.held else None
                where = f"{path.name} row {number}"
                for caption in range(_num_captions(values)):
                    yield row_or_fault(
                        where, _row, values, caption, image, place, columns.several, names, number
                    )


@dataclass(slots=True)
class _Image:
    """What a cell tells without its bytes being read."""

    paths: tuple[str, ...] = ()
    held: bool = False
    count: int = 1  # of those that are held


def _inner(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_list(kind) or pa.types.is_large_list(kind) else kind


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _images(batch: pa.RecordBatch, columns: Columns) -> Iterator[_Image]:
    if "image" not in columns.own:
        yield from (_Image() for _ in range(batch.num_rows))
        return
    cells = batch.column(columns.own["image"])
    if _is_text(_inner(cells.type)) and not columns.base64:
        for value in cells.to_pylist():
            paths = [value] if isinstance(value, str) else value
            yield _Image(tuple(paths or ()))
    elif _inner(cells.type) is not cells.type:
        for length in pc.list_value_length(cells).to_pylist():
            yield _Image(held=bool(length), count=length or 0)
    elif pa.types.is_struct(cells.type):
        fields = [field.name for field in cells.type]
        none = pa.nulls(len(cells))
        held = pc.struct_field(cells, "bytes").is_valid() if "bytes" in fields else none
        names = pc.struct_field(cells, "path") if "path" in fields else none
        for name, is_held in zip(names.to_pylist(), held.to_pylist(), strict=True):
            yield _Image(() if name is None else (name,), bool(is_held))
    else:
        yield from (_Image(held=valid) for valid in cells.is_valid().to_pylist())


def _class_names(schema: pa.Schema, columns: Columns) -> list[str]:
    """Names of the classes that an integer label counts, where the file says them."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return [str(name) for name in features[columns.own["label"]]["names"]]
    except (KeyError, TypeError, ValueError, RecursionError):
        return []


def _num_captions(values: Mapping[str, Any]) -> int:
    captions = values.get("caption")
    return max(1, len(captions)) if isinstance(captions, list) else 1


def _row(
    values: Mapping[str, Any],
    caption: int,
    image: _Image,
    place: tuple[int, int, int] | None,
    several: str,
    names: list[str],
    number: int,
) -> Row:
    paths = tuple(string(path, "the path") for path in chosen_images(image.paths, several))
    row = Row(image=paths[0] if paths else None, more_images=paths[1:])
    row.place = place
    row.num_images = len(chosen_images(("",) * image.count, several))
    if place is not None:  # its path need not be its own: many tables name every image alike
        row.image_id = str(number - 1)
    for column in ("image_id", "caption_id"):
        if values.get(column) is not None:
            setattr(row, column, identity(values[column], column))
    if "caption" in values:
        row.caption = _caption(values["caption"], caption)
    if values.get("question") is not None:
        row.question = string(values["question"], "the question")
    for column in ("question_type", "answer_type"):
        if values.get(column) is not None:
            setattr(row, column, string(values[column], f"the {column}"))
    if "conversations" in values:
        row.turns = conversation(values["conversations"])
    elif "instruction" in values and "outputs" in values:
        row.turns = instruction(
            values["instruction"], values.get("inputs"), _only(values["outputs"])
        )
    row.answers = answers(values.get("answers"))
    row.labels = strings(values.get("labels"), "labels")
    label = values.get("label")
    if isinstance(label, int) and 0 <= label < 1 << 31:
        row.label = label
        row.labels = row.labels or tuple(names[label : label + 1])
    elif isinstance(label, str):
        row.labels = row.labels or (label,)
    return row


def _caption(value: Any, number: int) -> str:
    if isinstance(value, list):
        value = value[number] if value else ""
    if isinstance(value, dict):  # a sentence of a Karpathy split
        value = value.get("raw")
    return string(value, "the caption")


def _only(value: Any) -> Any:
    return value[0] if isinstance(value, list) and len(value) == 1 else value
