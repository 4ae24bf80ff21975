"""Rows of annotation files → a cached, memory-mapped table.

A format says how its files are read: an iterator of ``Row``. All else is here: the rows are written
in batches to an Arrow file, once. engine/data/tables/source.py reads samples out of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from engine.data.tables import table as tables
from engine.data.tables.fields import first_answer, question_caption
from engine.data.tables.table import Table, open_table
from engine.errors import UserError
from engine.types import BadSample, Turn

FORM = 3  # of the cached file; raised when its content changes
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
        ("more_images", pa.list_(pa.string())),
        ("num_images", pa.int32()),
        ("question_type", pa.string()),
        ("answer_type", pa.string()),
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
    more_images: tuple[str, ...] = ()  # paths of the second and all further images
    num_images: int = 1  # to be used of those at ``place``
    question_type: str | None = None
    answer_type: str | None = None


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
    alone = (
        row.image, row.caption, row.image_id, row.caption_id, row.question, row.question_type,
        row.answer_type,
    )  # fmt: skip
    texts = [text for text in alone if text is not None]
    texts += row.more_images
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
            row.more_images or None,
            row.num_images if row.num_images != 1 else None,
            row.question_type or None,
            row.answer_type or None,
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
