"""Parquet tables of images and texts; images as bytes, ``{bytes, path}``, base64 or paths.

    <root>/train*.parquet  val*.parquet    columns image, caption and others (USUAL_NAMES)
    <root>/…                               the images, where the table holds paths

A Parquet file can be read in groups of rows only: too slow for samples in any order. The columns in
use are therefore copied once into an Arrow file that is memory-mapped, as large as the images are.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from engine.data.cache import cached_file
from engine.data.tables.arrow import Columns, TableOptions, holds_bytes, open_arrow
from engine.data.tables.paths import SplitFolder
from engine.data.tables.source import TableSource
from engine.errors import UserError

FORM = 1  # of the copied file; raised when its content changes
_ROWS_OF_BYTES, _ROWS_OF_TEXT = 64, 8192  # written at once


class Config(TableOptions):
    """Options of ``format: parquet``; files and folders are relative to ``root``."""

    train: str | list[str] = "train*.parquet"  # a file or a pattern of files, or several
    valid: str | list[str] = "val*.parquet"


def build(config: Config, *, name: str, split: str, cache_dir: Path) -> TableSource:
    """Open one split. Raises UserError, naming the path, for what is missing or malformed."""
    folder = SplitFolder(config, name, split)
    paths = folder.files(folder.of(config.train, config.valid), split, ".parquet")
    schema = _schema(paths[0])

    def copied(path: Path, columns: Columns) -> Path:
        return cached_file(
            [path],
            ("parquet", FORM, sorted(columns.own.values())),
            lambda temporary: _copy(path, columns, holds_bytes(schema, columns), temporary),
            cache_dir=cache_dir,
            ending="arrows",
        )

    return open_arrow(folder, paths, schema, copied, cache_dir=cache_dir)


def _schema(path: Path) -> pa.Schema:
    try:
        return pq.read_schema(path)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"cannot read {path} as Parquet: {error}") from error


def _copy(path: Path, columns: Columns, in_table: bool, target: Path) -> None:
    """The columns in use of a Parquet file as an Arrow stream."""
    wanted = list(columns.own.values())
    schema = _schema(path)
    if missing := [own for own in wanted if own not in schema.names]:
        raise UserError(f"{path} has no column {missing[0]!r}, as the split's first file has")
    plain = pa.schema([_plain(schema.field(own)) for own in wanted], metadata=schema.metadata)
    rows = _ROWS_OF_BYTES if in_table else _ROWS_OF_TEXT
    with pa.ipc.new_stream(str(target), plain) as writer:
        for batch in _batches(path, wanted, rows):
            writer.write_batch(batch.select(wanted).cast(plain))


def _batches(path: Path, wanted: list[str], rows: int) -> Iterator[pa.RecordBatch]:
    try:
        with pq.ParquetFile(path, memory_map=True, pre_buffer=False) as file:
            yield from file.iter_batches(rows, columns=wanted, use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"cannot read {path} as Parquet: {error}") from error


def _plain(field: pa.Field) -> pa.Field:
    """A column of categories as one of their values."""
    return field.with_type(field.type.value_type) if pa.types.is_dictionary(field.type) else field
