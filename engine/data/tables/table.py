"""Tables kept off the Python heap: written once as Arrow files, then memory-mapped.

All workers of a machine share the files' pages, so that ten million rows cost each of them next to
nothing. A table lies in a cache folder and is named by the size and modification time of the files
that it was made of: changed files get a new one.
"""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from engine.data.once import make_once
from engine.errors import UserError

BLOCK_BYTES = 4 << 20  # written at once, roughly: the unit in which a table is read through
_NAME_LENGTH = 100  # of an input's name in the name of its table


class Table:
    """Rows of an Arrow file, read through a memory map; pickled as a path."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._open()

    def _open(self) -> None:
        with pa.memory_map(str(self.path)) as file:
            table = pa.ipc.open_file(file).read_all()
        self._length = table.num_rows
        self.metadata = {k.decode(): v.decode() for k, v in (table.schema.metadata or {}).items()}
        self._columns = {name: table.column(name) for name in table.column_names}
        # Columns that hold nothing cost no look-up; the file says which they are.
        self._empty = dict.fromkeys(name for name in self._columns if not self.has_values(name))
        self._held = {n: column for n, column in self._columns.items() if n not in self._empty}

    def __getstate__(self) -> Path:
        return self.path

    def __setstate__(self, path: Path) -> None:
        self.path = path
        self._open()

    def __len__(self) -> int:
        return self._length

    @property
    def column_names(self) -> list[str]:
        """The columns in their order."""
        return list(self._columns)

    def row(self, index: int) -> dict[str, Any]:
        """One row by column name; raises IndexError outside ``range(len(table))``."""
        if not 0 <= index < self._length:
            raise IndexError(f"row {index} of {self._length} in {self.path}")
        found = {name: column[index].as_py() for name, column in self._held.items()}
        return found | self._empty if self._empty else found

    def has_values(self, name: str) -> bool:
        """Whether any row has a value in the column."""
        column = self._columns[name]
        return bool(column.null_count < len(column))

    def codes(self, name: str) -> np.ndarray:
        """int64 [rows], memory-mapped: equal where the column's values are, numbered as they first
        appear; -1 where a row has no value."""
        return self.kept(f"{name}.codes", np.int64, self._length, lambda: self._encoded(name))

    def integers(self, name: str) -> np.ndarray:
        """int64 [rows], memory-mapped: a column of integers without gaps."""
        return self.kept(
            f"{name}.values",
            np.int64,
            self._length,
            lambda: (c.to_numpy() for c in self._column(name)),
        )

    def values(self, name: str) -> Iterator[Any]:
        """A column's values in order, some thousands in memory at a time."""
        for chunk in self._column(name):
            yield from chunk.to_pylist()

    def _column(self, name: str) -> Iterator[pa.Array]:
        return iter(self._columns[name].chunks)

    def _encoded(self, name: str) -> Iterator[np.ndarray]:
        """Codes a chunk at a time; the distinct values are in memory meanwhile."""
        for chunk in self._columns[name].dictionary_encode().chunks:
            yield chunk.indices.fill_null(-1).to_numpy()
        pa.default_memory_pool().release_unused()

    def batches(self, names: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Some columns, some thousands of rows at a time; nothing is copied."""
        columns = pa.table([self._columns[name] for name in names], names=list(names))
        return iter(columns.to_batches())

    def kept(
        self, what: str, kind: type, length: int, chunks: Callable[[], Iterator[np.ndarray]]
    ) -> np.ndarray:
        """An array made of the table, written once beside it, else held in memory."""
        path = self.path.with_name(f"{self.path.name}.{what}.npy")

        def write(temporary: Path) -> None:
            array = np.lib.format.open_memmap(temporary, "w+", kind, (length,))
            _fill(array, chunks())
            array.flush()

        try:
            make_once(path, write)
        except OSError:  # a cache that another user made and this one may only read
            array: np.ndarray = np.empty(length, kind)
            _fill(array, chunks())
            return array
        return np.load(path, mmap_mode="r")


def _fill(array: np.ndarray, chunks: Iterable[np.ndarray]) -> None:
    start = 0
    for chunk in chunks:
        array[start : start + len(chunk)] = chunk
        start += len(chunk)


def open_table(
    inputs: Sequence[Path], options: object, write: Callable[[Path], None], *, cache_dir: Path
) -> Table:
    """The table that ``write(temporary_path)`` makes of ``inputs``, made once for their state.

    ``options`` is all else that the table depends on, told apart by its ``repr``. Raises UserError
    for an input that cannot be read and a cache that cannot be written.
    """
    return Table(cached_file(inputs, options, write, cache_dir=cache_dir, ending="arrow"))


def cached_file(
    inputs: Sequence[Path],
    options: object,
    write: Callable[[Path], None],
    *,
    cache_dir: Path,
    ending: str,
) -> Path:
    """The file that ``write(temporary_path)`` makes of ``inputs``, as ``open_table`` keeps it.

    It lies in ``.engine_cache`` beside the first input, or in ``cache_dir`` where that cannot be
    written; files of former states are removed.
    """
    first = inputs[0]
    state = _state(inputs)
    folder = cache_folder(first, cache_dir)
    named = _digest(options, [str(path.absolute()) for path in inputs[1:]])
    stem = f"{first.name[:_NAME_LENGTH]}.{named}"
    target = folder / f"{stem}.{state}.{ending}"
    if not target.exists():
        try:
            make_once(target, write)
        except OSError as error:
            raise UserError(f"cannot write the table of {first} in {folder}: {error}") from error
        for old in folder.glob(f"{glob.escape(stem)}.*"):
            if not old.name.startswith(target.name):
                old.unlink(missing_ok=True)  # processes that mapped it keep its pages
    return target


def cache_folder(path: Path, cache_dir: Path) -> Path:
    """Where what is made of the file ``path`` is kept."""
    beside = path.parent / ".engine_cache"
    if os.access(beside if beside.exists() else path.parent, os.W_OK):
        return beside
    return cache_dir / _digest(str(path.parent.resolve()))


def _state(inputs: Sequence[Path]) -> str:
    """Sizes and times of the inputs: spelled out for one, hashed for several."""
    stats = []
    for path in inputs:
        try:
            stat = path.stat()
        except OSError as error:
            raise UserError(f"cannot read annotation file {path}: {error.strerror}") from None
        stats.append(f"{stat.st_size}-{stat.st_mtime_ns}")
    return stats[0] if len(stats) == 1 else _digest(stats)


def _digest(*values: object) -> str:
    return hashlib.blake2b(repr(values).encode(), digest_size=8).hexdigest()
