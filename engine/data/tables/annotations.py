"""Rows of annotation files → a cached, memory-mapped table → a source.

A format says how its files are read: an iterator of ``Row``. All else is here: the rows are written
in batches to an Arrow file, once, and a sample's image is fetched from where its row says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from engine.data.tables import table as tables
from engine.data.tables.fields import first_answer, most_common, question_caption
from engine.data.tables.image_root import ImageRoot
from engine.data.tables.table import Table, open_table
from engine.errors import UserError
from engine.types import BadSample, Record, Turn

FORM = 1  # of the cached file; raised when its content changes
_ROWS = 32_768  # written at once at most
_TURN = pa.struct([("role", pa.string()), ("text", pa.string())])
SCHEMA = pa.schema(
    [
        ("image", pa.string()),
        ("image_id", pa.string()),
        ("caption", pa.string()),
        ("caption_id", pa.string()),
        ("question", pa.string()),
        ("turns", pa.list_(_TURN)),
        ("answers", pa.list_(pa.string())),
        ("labels", pa.list_(pa.string())),
        ("label", pa.int64()),
        ("file", pa.int32()),
        ("offset", pa.int64()),
        ("extent", pa.int64()),
        ("fault", pa.string()),
    ]
)


@dataclass(slots=True)
class Row:
    """One sample of an annotation file; what is None is made up from the rest, or absent."""

    image: str | None = None  # its path inside the image folder
    caption: str | None = None
    image_id: str | None = None
    caption_id: str | None = None
    question: str | None = None
    turns: tuple[Turn, ...] = ()
    answers: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    label: int | None = None
    place: tuple[int, int, int] | None = None  # of image bytes: file, offset, extent
    fault: str | None = None  # "cause: detail" of a sample that cannot be used


class ImageStore(Protocol):
    """Image bytes that lie in annotation files."""

    def read(self, file: int, offset: int, extent: int) -> bytes | None:
        """The bytes at a row's place; raises BadSample where there are none to be had."""
        ...


def row_or_fault(where: str, make: Callable[..., Row], *arguments: Any) -> Row:
    """What ``make(*arguments)`` returns, or the row of a sample that cannot be used where it raises
    BadSample; ``where`` names it in the file."""
    try:
        row = make(*arguments)
        # Lone surrogates: bytes that were no UTF-8, or escapes that are no character.
        "".join(_texts(row)).encode()
    except BadSample as bad:
        return Row(fault=f"{bad.cause}: {where}: {bad.detail}".encode(errors="replace").decode())
    except UnicodeEncodeError:
        return Row(fault=f"not text: {where}")
    return row


def _texts(row: Row) -> list[str]:
    alone = (row.image, row.caption, row.image_id, row.caption_id, row.question)
    texts = [text for text in alone if text is not None]
    texts += [text for _, text in row.turns]
    texts += row.answers
    texts += row.labels
    return texts


def open_annotations(
    inputs: Sequence[Path],
    options: object,
    rows: Callable[[], Iterable[Row]],
    *,
    cache_dir: Path,
) -> Table:
    """The table of ``rows()``, made once for the inputs' sizes and times and for ``options``.

    Raises UserError where there are no rows, or none that can be used, and what ``rows`` raises.
    """

    def write(temporary: Path) -> None:
        first_fault, num_rows, num_faults = "", 0, 0
        with pa.OSFile(str(temporary), "wb") as file, pa.ipc.new_file(file, SCHEMA) as writer:
            for batch in _batches(rows()):
                for row in batch:
                    if row.fault is not None:
                        first_fault = first_fault or row.fault
                        num_faults += 1
                writer.write_batch(_to_arrow(batch, num_rows))
                num_rows += len(batch)
        if num_rows == 0:
            raise UserError(f"{inputs[0]} has no samples in it")
        if num_faults == num_rows:
            raise UserError(f"no sample of {inputs[0]} can be used; the first: {first_fault}")

    return open_table(inputs, (FORM, options), write, cache_dir=cache_dir)


def _batches(rows: Iterable[Row]) -> Iterator[list[Row]]:
    batch: list[Row] = []
    size = 0
    for row in rows:
        batch.append(row)
        size += sum(map(len, _texts(row)))
        if len(batch) == _ROWS or size >= tables.BLOCK_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _to_arrow(rows: list[Row], rows_before: int) -> pa.RecordBatch:
    columns: dict[str, list[Any]] = {name: [] for name in SCHEMA.names}
    for number, row in enumerate(rows, rows_before):
        file, offset, extent = row.place or (None, None, None)
        values = (
            row.image,
            row.image_id if row.image_id is not None else (row.image or str(number)),
            row.caption if row.caption is not None else _caption(row),
            row.caption_id if row.caption_id is not None else str(number),
            row.question,
            [{"role": role, "text": text} for role, text in row.turns] or None,
            row.answers or None,
            row.labels or None,
            row.label,
            file,
            offset,
            extent,
            row.fault,
        )
        for column, value in zip(columns.values(), values, strict=True):
            column.append(value)
    return pa.record_batch(
        [pa.array(columns[field.name], field.type) for field in SCHEMA], schema=SCHEMA
    )


def _caption(row: Row) -> str:
    if row.turns:
        return first_answer(row.turns)
    if row.question is not None:
        return question_caption(row.question, row.answers)
    return ", ".join(row.labels)


class AnnotationSource:
    """Rows of a table as one split of a dataset.

    ``images`` is the folder of images that rows name, ``store`` reads those that lie in files of
    many. A row that names neither has image None.
    """

    def __init__(
        self,
        name: str,
        split: str,
        table: Table,
        images: ImageRoot | None = None,
        store: ImageStore | None = None,
    ) -> None:
        self.name = name
        self.split = split
        self.table = table
        self.images = images
        self.store = store

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> Record:
        """The row at ``index``; BadSample where it cannot be used, or its image lies elsewhere."""
        row = self.table.row(index)
        number = f"row {index + 1}"
        if row.get("fault"):
            cause, _, detail = row["fault"].partition(": ")
            raise BadSample(cause, detail)
        if row["caption"] is None:
            raise BadSample("not text", f"{number} is not UTF-8")
        if not row["caption"].strip():
            raise BadSample("no caption", number)
        given = tuple(answer for answer in row.get("answers") or () if answer)
        return Record(
            row["image"] or number,
            self._image(row, number),
            row["caption"],
            row["image_id"],
            row["caption_id"],
            row.get("label"),
            _turns(row, given),
            given,
            tuple(label for label in row.get("labels") or () if label),
        )

    def _image(self, row: dict[str, Any], number: str) -> Path | bytes | None:
        if row.get("file") is not None and self.store is not None:
            return self.store.read(row["file"], row["offset"], row["extent"])
        if row["image"] is None:
            return None
        if not row["image"]:
            raise BadSample("missing", f"{number} names no image")
        if self.images is None:
            raise BadSample("missing", f"{number} names {row['image']!r}; there is no image folder")
        return self.images.path(row["image"])

    def column(self, name: str) -> np.ndarray:
        """int64 codes of ``image_id`` or ``caption_id``, equal where the ids are; memory-mapped."""
        return self.table.codes(name)

    def captions(self) -> Iterator[str]:
        """All captions in order, without their images; empty where a row has none."""
        return (caption or "" for caption in self.table.values("caption"))


def _turns(row: dict[str, Any], given: tuple[str, ...]) -> tuple[Turn, ...]:
    if row.get("turns"):
        return tuple((turn["role"], turn["text"]) for turn in row["turns"])
    if not row.get("question"):
        return ()
    asked = ("human", row["question"])
    return (asked, ("gpt", most_common(given))) if given else (asked,)
