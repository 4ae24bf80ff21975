"""Annotation tables kept off the Python heap: a CSV becomes a memory-mapped Arrow file, once.

All workers of a machine share the file's pages, so that ten million rows cost each of them next to
nothing. The Arrow file lies in a cache folder and is named by the CSV's size and modification time:
a changed CSV gets a new one.
"""

from __future__ import annotations

import csv
import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from engine.data.once import make_once
from engine.errors import UserError

FORM = 1  # of the cached file; raised when its content changes
COLUMNS = ("image", "image_id", "caption", "caption_id")
USUAL_NAMES = {
    "image": ("image", "filepath", "file_path", "file_name", "filename", "image_path", "path"),
    "image_id": ("image_id",),
    "caption": ("caption", "title", "text"),
    "caption_id": ("caption_id",),
}
REQUIRED = ("image", "caption")
# A path that could leave its folder: absolute, with a drive, or with a part '..'.
_OUTSIDE = r"^[/\\~]|^[A-Za-z]:|(^|[/\\])\.\.([/\\]|$)|\x00"
_BLOCK_BYTES = 4 << 20


class Table:
    """Rows of an Arrow file, read through a memory map; pickled as a path."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._open()

    def _open(self) -> None:
        with pa.memory_map(str(self.path)) as file:
            table = pa.ipc.open_file(file).read_all()
        self._length = table.num_rows
        self._columns = {name: table.column(name) for name in table.column_names}

    def __getstate__(self) -> Path:
        return self.path

    def __setstate__(self, path: Path) -> None:
        self.path = path
        self._open()

    def __len__(self) -> int:
        return self._length

    def row(self, index: int) -> dict[str, Any]:
        """One row by column name; raises IndexError outside ``range(len(table))``."""
        if not 0 <= index < self._length:
            raise IndexError(f"row {index} of {self._length} in {self.path}")
        return {name: column[index].as_py() for name, column in self._columns.items()}

    def codes(self, name: str) -> np.ndarray:
        """int64 [rows]: equal where the column's values are, numbered as they first appear."""
        chunks = self._columns[name].dictionary_encode().chunks
        return np.concatenate([chunk.indices.to_numpy() for chunk in chunks]).astype(np.int64)

    def values(self, name: str) -> Iterator[Any]:
        """A column's values in order, some thousands in memory at a time."""
        for chunk in self._columns[name].chunks:
            yield from chunk.to_pylist()


def open_csv(path: Path, *, cache_dir: Path, names: Mapping[str, str] | None = None) -> Table:
    """The table of a CSV or TSV with a header: columns image, image_id, caption, caption_id.

    ``names`` maps those to the file's own column names, where they are not the usual ones. An
    absent image_id is the image's path, an absent caption_id the row's number. The Arrow file is
    kept in ``.engine_cache`` beside the CSV, or in ``cache_dir`` where that cannot be written.
    Raises UserError for a file that is missing, empty or malformed, for a missing column, and for
    an image path that leaves its folder.
    """
    try:
        stat = path.stat()
    except OSError as error:
        raise UserError(f"cannot read annotation file {path}: {error.strerror}") from None
    named = hashlib.blake2b(repr(sorted((names or {}).items())).encode(), digest_size=4)
    state = f"{stat.st_size}-{stat.st_mtime_ns}-{FORM}"
    folder = _cache_folder(path, cache_dir)
    target = folder / f"{path.name}.{named.hexdigest()}.{state}.arrow"
    if not target.exists():
        separator, columns = _columns(path, dict(names or {}))
        try:
            make_once(target, lambda temporary: _convert(path, separator, columns, temporary))
        except OSError as error:
            raise UserError(f"cannot write the table of {path} in {folder}: {error}") from error
        for old in folder.glob(f"{path.name}.{named.hexdigest()}.*"):
            if old != target:  # of a former state; processes that mapped it keep its pages
                old.unlink(missing_ok=True)
    return Table(target)


def _cache_folder(path: Path, cache_dir: Path) -> Path:
    beside = path.parent / ".engine_cache"
    if os.access(beside if beside.exists() else path.parent, os.W_OK):
        return beside
    place = hashlib.blake2b(str(path.parent.resolve()).encode(), digest_size=8).hexdigest()
    return cache_dir / place


def _columns(path: Path, names: dict[str, str]) -> tuple[str, dict[str, str]]:
    """The separator, and the file's own name of each column that it has."""
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        header = file.readline()
    if not header.strip():
        raise UserError(f"{path} is empty; its first line must name its columns")
    readings = [(mark, next(csv.reader([header], delimiter=mark))) for mark in (",", "\t")]
    known = {name for usual in USUAL_NAMES.values() for name in usual} | set(names.values())
    separator, found = max(readings, key=lambda reading: len(known.intersection(reading[1])))
    columns = {}
    for column in COLUMNS:
        usual = (names[column],) if column in names else USUAL_NAMES[column]
        own = next((name for name in usual if name in found), None)
        if own is not None:
            columns[column] = own
        elif column in names or column in REQUIRED:
            raise UserError(
                f"{path} has no column for the {column} ({' or '.join(usual)}); "
                f"its columns are: {', '.join(found)}"
            )
    return separator, columns


def _convert(path: Path, separator: str, columns: dict[str, str], target: Path) -> None:
    """Stream the CSV into an Arrow file."""
    schema = pa.schema([(name, pa.string()) for name in COLUMNS])
    own = list(dict.fromkeys(columns.values()))
    num_rows = 0
    try:
        reader = pa.csv.open_csv(
            path,
            # One thread: an error then names its row.
            read_options=pa.csv.ReadOptions(block_size=_BLOCK_BYTES, use_threads=False),
            parse_options=pa.csv.ParseOptions(delimiter=separator, newlines_in_values=True),
            convert_options=pa.csv.ConvertOptions(
                include_columns=own, column_types=dict.fromkeys(own, pa.string())
            ),
        )
        with pa.OSFile(str(target), "wb") as file, pa.ipc.new_file(file, schema) as writer:
            for batch in reader:
                data = {name: batch.column(theirs) for name, theirs in columns.items()}
                _refuse_outside(data["image"], num_rows, path)
                rows = np.arange(num_rows, num_rows + batch.num_rows)
                data.setdefault("image_id", data["image"])
                data.setdefault("caption_id", pa.array(rows).cast(pa.string()))
                writer.write_batch(pa.record_batch([data[n] for n in COLUMNS], schema=schema))
                num_rows += batch.num_rows
    except pa.ArrowInvalid as error:
        raise UserError(f"cannot read {path} as a table: {error}") from error
    if num_rows == 0:
        raise UserError(f"{path} has no rows under its header")


def _refuse_outside(images: pa.Array, rows_before: int, path: Path) -> None:
    first = pc.index(pc.match_substring_regex(images, _OUTSIDE), True).as_py()
    if first >= 0:
        raise UserError(
            f"row {rows_before + first + 1} of {path} names an image outside its folder: "
            f"{images[first].as_py()!r}; give paths relative to the image folder, without '..'"
        )
