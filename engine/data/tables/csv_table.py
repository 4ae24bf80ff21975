"""CSV files as memory-mapped tables."""

from __future__ import annotations

import csv
import functools
import io
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from engine.data.tables import table as tables
from engine.data.tables.paths import OUTSIDE
from engine.data.tables.table import Table, open_table
from engine.data.tables.values import lacks, own_names, question_caption
from engine.errors import UserError

Column = Literal[
    "image", "image_id", "caption", "caption_id", "question", "answers", "labels", "question_type",
    "answer_type",
]  # fmt: skip
USUAL_NAMES = {
    "image": ("image", "filepath", "file_path", "file_name", "filename", "image_path", "path"),
    "image_id": ("image_id",),
    "caption": ("caption", "title", "text"),
    "caption_id": ("caption_id", "question_id"),
    "question": ("question",),
    "answers": ("answers", "answer"),
    "labels": ("labels",),
    "question_type": ("question_type",),
    "answer_type": ("answer_type",),
}
LISTS = ("answers", "labels")  # joined by '|'
TEXTS = ("caption", "question", "labels")  # one of these there must be
SEPARATORS = (",", "\t", ";", "|")
_HEADER_BYTES = 1 << 20


def open_csv(
    path: Path,
    *,
    cache_dir: Path,
    names: Mapping[str, str] | None = None,
    usual: Mapping[str, tuple[str, ...]] = USUAL_NAMES,
) -> Table:
    """The table of a CSV with a header, its columns separated by ``,`` tab ``;`` or ``|``.

    ``names`` maps the table's columns (``usual``) to the file's own names, where they are not among
    the usual ones. An absent caption is made of question and answer, else of the labels. A row with
    text that is not UTF-8 cannot be used. Raises UserError for a file that is missing, empty or
    malformed, for a missing column, and for an image path that leaves its folder.
    """

    def batches() -> Iterator[pa.RecordBatch]:
        return _batches(path, *_columns(path, dict(names or {}), usual))

    options = ("csv", sorted((names or {}).items()), sorted(usual.items()))
    return open_table([path], options, batches, cache_dir=cache_dir)


def _columns(
    path: Path, names: dict[str, str], usual: Mapping[str, tuple[str, ...]]
) -> tuple[str, int, dict[str, int]]:
    """The separator, the number of the file's columns, and the place of each that is wanted."""
    with path.open("rb") as file:
        head = file.read(_HEADER_BYTES)
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"{path} is UTF-16 text; save it as UTF-8")
    text = head.decode("utf-8-sig", errors="replace")
    if not text.partition("\n")[0].strip():
        raise UserError(f"{path} is empty; its first line must name its columns")
    known = {name for listed in usual.values() for name in listed} | set(names.values())
    readings = []
    for mark in SEPARATORS:
        with suppress(csv.Error):
            first = next(csv.reader(io.StringIO(text, newline=""), delimiter=mark), [])
            readings += [(mark, first)] if first else []
    if not readings:
        raise UserError(f"cannot read the first line of {path} as column names")
    separator, found = max(readings, key=lambda r: (len(known.intersection(r[1])), len(r[1])))
    own = own_names(found, names, usual, path, ("image",))
    columns = {column: found.index(name) for column, name in own.items()}
    if not set(columns).intersection(TEXTS):
        options = [name for column in TEXTS for name in usual.get(column, ())]
        raise lacks(path, f"no column {' or '.join(options)}", found)
    return separator, len(found), columns


def _batches(
    path: Path, separator: str, num_columns: int, columns: dict[str, int]
) -> Iterator[pa.RecordBatch]:
    """The CSV's rows, as many at a time as fill a block."""
    # Places instead of names: a file may use one twice, or bytes that are not text.
    places = [str(place) for place in range(num_columns)]
    used = [places[place] for place in sorted(set(columns.values()))]
    num_rows = 0
    try:
        reader = pa.csv.open_csv(
            path,
            # One thread: an error then names its row.
            read_options=pa.csv.ReadOptions(
                block_size=tables.BLOCK_BYTES,
                use_threads=False,
                column_names=places,
                skip_rows_after_names=1,
            ),
            parse_options=pa.csv.ParseOptions(delimiter=separator, newlines_in_values=True),
            convert_options=pa.csv.ConvertOptions(
                include_columns=used, column_types=dict.fromkeys(used, pa.binary())
            ),
        )
        for batch in reader:
            texts = {place: _text(batch.column(place)) for place in used}
            named = {column: texts[places[place]] for column, place in columns.items()}
            _refuse_outside(named["image"], num_rows, path)
            yield _complete(named, num_rows)
            num_rows += batch.num_rows
    except pa.ArrowInvalid as error:
        hint = " (or a quote is not closed)" if "straddl" in str(error) else ""
        raise UserError(f"cannot read {path} as a table: {error}{hint}") from error
    if num_rows == 0:
        raise UserError(f"{path} has no rows under its header")


def _text(column: pa.Array) -> pa.Array:
    """Bytes as strings; null where they are not UTF-8."""
    with suppress(pa.ArrowInvalid):
        return column.cast(pa.string())
    texts: list[str | None] = []
    for value in column.to_pylist():
        try:
            texts.append(value.decode())
        except UnicodeDecodeError:
            texts.append(None)
    return pa.array(texts, pa.string())


def _complete(texts: dict[str, pa.Array], rows_before: int) -> pa.RecordBatch:
    """The columns of a table; a row with bytes that are not text has no caption, but a cause."""
    not_text = [pc.is_null(column) for column in texts.values() if column.null_count]
    images = texts.pop("image")
    for name in LISTS:
        if name in texts:
            texts[name] = pc.split_pattern(texts[name], "|")
    if "caption" not in texts:
        texts["caption"] = _captions(texts, len(images))
    faults = [pa.nulls(len(images), pa.string())] * 2
    if not_text:
        bad = functools.reduce(pc.or_, not_text)
        numbers = pa.array(np.arange(rows_before, rows_before + len(images)) + 1).cast(pa.string())
        nothing = pa.scalar(None, pa.string())
        detail = pc.binary_join_element_wise("row ", numbers, " is not UTF-8", "")
        faults = [pc.if_else(bad, text, nothing) for text in ("not text", detail)]
        texts["caption"] = pc.if_else(bad, nothing, texts["caption"])
        for name in {"image_id", "caption_id"} & set(texts):
            texts[name] = texts[name].fill_null("")
    texts |= {"images": _files(images), "cause": faults[0], "detail": faults[1]}
    names = [name for name in tables.SCHEMA.names if name in texts]
    return pa.record_batch([texts[name] for name in names], names=names)


def _files(paths: pa.Array) -> pa.Array:
    """The column ``images`` of rows that show one file each; none where it is null."""
    place = pa.StructArray.from_arrays([paths.drop_null()], names=["path"])
    shown = paths.is_valid().to_numpy(zero_copy_only=False)
    ends = np.cumsum(np.append(0, shown), dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(ends), place)


def _captions(columns: dict[str, pa.Array], length: int) -> pa.Array:
    if "question" not in columns:
        return pc.binary_join(columns["labels"], ", ")
    answers = columns["answers"].to_pylist() if "answers" in columns else [()] * length
    pairs = zip(columns["question"].to_pylist(), answers, strict=True)
    captions = [None if None in pair else question_caption(*pair) for pair in pairs]
    return pa.array(captions, pa.string())


def _refuse_outside(images: pa.Array, rows_before: int, path: Path) -> None:
    first = pc.index(pc.match_substring_regex(images, OUTSIDE), True).as_py()
    if first >= 0:
        raise UserError(
            f"row {rows_before + first + 1} of {path} names an image outside its folder: "
            f"{images[first].as_py()!r}; give paths relative to the image folder, without '..'"
        )
