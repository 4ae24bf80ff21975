"""CSV files as memory-mapped tables."""

from __future__ import annotations

import csv
import functools
import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from engine.data.tables import table as tables
from engine.data.tables.fields import question_caption
from engine.data.tables.image_root import OUTSIDE
from engine.data.tables.table import Table, open_table
from engine.errors import UserError

FORM = 3  # of the cached file; raised when its content changes
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

    Its columns: image, image_id, caption, caption_id, and question, answers, labels, question_type
    and answer_type where the file has them. ``names`` maps those to the file's own column names,
    where they are not among the ``usual`` ones. An absent image_id is the image's path, an absent
    caption_id the row's number, an absent caption is made of question and answer, else of the
    labels. Text that is not UTF-8 is None. Raises UserError for a file that is missing, empty or
    malformed, for a missing column, and for an image path that leaves its folder.
    """

    def write(temporary: Path) -> None:
        _convert(path, *_columns(path, dict(names or {}), usual), temporary)

    options = ("csv", FORM, sorted((names or {}).items()), sorted(usual.items()))
    return open_table([path], options, write, cache_dir=cache_dir)


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
    readings = [(mark, found) for mark in SEPARATORS if (found := _header(text, mark))]
    if not readings:
        raise UserError(f"cannot read the first line of {path} as column names")
    separator, found = max(readings, key=lambda r: (len(known.intersection(r[1])), len(r[1])))
    columns = {}
    for column, listed in usual.items():
        # A column that the user gives one meaning has no other by its name, but the image's may be
        # its id.
        free = tuple(n for n in listed if column == "image" or n not in names.values())
        wanted = (names[column],) if column in names else free
        own = next((name for name in wanted if name in found), None)
        if own is not None:
            columns[column] = found.index(own)
        elif column in names or column == "image":
            raise UserError(
                f"{path} has no column for the {column} ({' or '.join(wanted)}); "
                f"its columns are: {', '.join(found)}"
            )
    if not set(columns).intersection(TEXTS):
        options = [name for column in TEXTS for name in usual.get(column, ())]
        raise UserError(
            f"{path} has no column {' or '.join(options)}; its columns are: {', '.join(found)}"
        )
    return separator, len(found), columns


def _header(text: str, separator: str) -> list[str] | None:
    try:
        return next(csv.reader(io.StringIO(text, newline=""), delimiter=separator))
    except (csv.Error, StopIteration):
        return None


def _convert(
    path: Path, separator: str, num_columns: int, columns: dict[str, int], target: Path
) -> None:
    """Stream the CSV into an Arrow file."""
    # Places instead of names: a file may use one twice, or bytes that are no text.
    places = [str(place) for place in range(num_columns)]
    used = [places[place] for place in sorted(set(columns.values()))]
    num_rows, writer = 0, None
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
        with pa.OSFile(str(target), "wb") as file:
            for batch in reader:
                texts = {place: _text(batch.column(place)) for place in used}
                named = {column: texts[places[place]] for column, place in columns.items()}
                _refuse_outside(named["image"], num_rows, path)
                made = _complete(named, num_rows)
                writer = writer or pa.ipc.new_file(file, made.schema)
                writer.write_batch(made)
                num_rows += batch.num_rows
            if writer is not None:
                writer.close()
    except pa.ArrowInvalid as error:
        hint = " (or a quote is not closed)" if "straddl" in str(error) else ""
        raise UserError(f"cannot read {path} as a table: {error}{hint}") from error
    if num_rows == 0:
        raise UserError(f"{path} has no rows under its header")


def _text(column: pa.Array) -> pa.Array:
    """Bytes as strings; null where they are no UTF-8."""
    try:
        return column.cast(pa.string())
    except pa.ArrowInvalid:
        return pa.array([_decoded(value) for value in column.to_pylist()], pa.string())


def _decoded(value: bytes) -> str | None:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return None


def _complete(columns: dict[str, pa.Array], rows_before: int) -> pa.RecordBatch:
    """The columns in their order, with what the file lacks; a row with bytes that are no text has
    no caption."""
    not_text = [pc.is_null(column) for column in columns.values() if column.null_count]
    for name in LISTS:
        if name in columns:
            columns[name] = pc.split_pattern(columns[name], "|")
    length = len(columns["image"])
    if "image_id" not in columns:
        columns["image_id"] = columns["image"]
    if "caption_id" not in columns:
        rows = np.arange(rows_before, rows_before + length)
        columns["caption_id"] = pa.array(rows).cast(pa.string())
    if "caption" not in columns:
        columns["caption"] = _captions(columns, length)
    if not_text:
        bad = functools.reduce(pc.or_, not_text)
        columns["caption"] = pc.if_else(bad, pa.scalar(None, pa.string()), columns["caption"])
        for name in ("image_id", "caption_id"):
            columns[name] = columns[name].fill_null("")
    ordered = {name: columns[name] for name in USUAL_NAMES if name in columns}
    return pa.record_batch(list(ordered.values()), names=list(ordered))


def _captions(columns: dict[str, pa.Array], length: int) -> pa.Array:
    if "question" not in columns:
        return pc.binary_join(columns["labels"], ", ")
    answers = columns["answers"].to_pylist() if "answers" in columns else [()] * length
    questions = columns["question"].to_pylist()
    return pa.array(
        [
            None if question is None or given is None else question_caption(question, given)
            for question, given in zip(questions, answers, strict=True)
        ],
        pa.string(),
    )


def _refuse_outside(images: pa.Array, rows_before: int, path: Path) -> None:
    first = pc.index(pc.match_substring_regex(images, OUTSIDE), True).as_py()
    if first >= 0:
        raise UserError(
            f"row {rows_before + first + 1} of {path} names an image outside its folder: "
            f"{images[first].as_py()!r}; give paths relative to the image folder, without '..'"
        )
