"""The index of a tar shard: one pass finds every sample, and from then on each is read by itself.

An index is an Arrow file of ``Row``s, memory-mapped by all processes of a machine. It is kept in
``.engine_cache`` beside its shard, or in a cache folder where that cannot be written, and is named
by the shard's state: size, time of change, and the check sum of its first header. A shard that
changes gets a new one.
"""

from __future__ import annotations

import gc
import json
import os
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from engine.data.tar.header import BLOCK
from engine.data.tar.samples import Row, fault, read_samples
from engine.data.tar.texts import TextForm

FORM = 3  # of the Arrow file; raised when its content changes
_INTEGERS = ("offset", "size")
SCHEMA = pa.schema(
    # Offsets of 64 bits: the texts of one shard may take more than 2 GiB.
    [(name, pa.int64() if name in _INTEGERS else pa.large_string()) for name in Row._fields]
)


class State(NamedTuple):
    """What a shard's index hangs on."""

    size: int
    mtime_ns: int
    first: int  # CRC-32 of its first header

    def __str__(self) -> str:
        return f"{self.size}-{self.mtime_ns}-{self.first:08x}"


def state_of(descriptor: int) -> State:
    """The state of an open shard."""
    stat = os.fstat(descriptor)
    return State(stat.st_size, stat.st_mtime_ns, zlib.crc32(os.pread(descriptor, BLOCK, 0)))


def write_index(shard: Path, target: Path, form: TextForm) -> int:
    """Index a shard into an Arrow file; returns the number of rows.

    Samples that are lost are rows with a cause. Raises OSError where either cannot be opened.
    """
    descriptor = os.open(shard, os.O_RDONLY)
    collecting = gc.isenabled()
    gc.disable()  # thousands of small objects without a cycle; looking for one is a tenth of it all
    try:
        rows = read_samples(descriptor, os.fstat(descriptor).st_size, form)
    finally:
        os.close(descriptor)
        if collecting:
            gc.enable()
    rows += _missing(shard, rows)
    if not rows:
        rows = [fault("empty shard", "no member ends in .jpg, .png, … after its first dot")]
    columns = zip(SCHEMA, zip(*rows, strict=True), strict=True)
    arrays = [pa.array(values, field.type) for field, values in columns]
    batch = pa.record_batch(arrays, schema=SCHEMA)
    with pa.OSFile(str(target), "wb") as file, pa.ipc.new_file(file, SCHEMA) as writer:
        writer.write_batch(batch)
    return len(rows)


def _missing(shard: Path, rows: list[Row]) -> list[Row]:
    """A row where img2dataset counted more samples than the shard has."""
    stats = shard.with_name(f"{shard.stem}_stats.json")
    try:
        counted = json.loads(stats.read_bytes())["successes"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return []
    found = len({row.offset for row in rows if row.offset >= 0})
    if not isinstance(counted, int) or counted <= found:
        return []
    return [
        fault("missing samples", f"{counted - found} of the {counted} that {stats.name} counts")
    ]


class TarIndex:
    """The rows of a shard's index, through a memory map.

    Raises OSError or ValueError (of which Arrow's are kinds) for a file that is no index.
    """

    def __init__(self, path: Path) -> None:
        with pa.memory_map(str(path)) as file:
            batch = pa.ipc.open_file(file).get_batch(0)
        if batch.schema != SCHEMA:
            raise ValueError(f"{path} is no index of this version")
        self.batch = batch
        self._length = batch.num_rows
        self._columns = [_reader(batch.column(name)) for name in SCHEMA.names]

    def __len__(self) -> int:
        return self._length

    @property
    def num_faults(self) -> int:
        """Rows that cannot be used."""
        return int(pc.sum(pc.not_equal(self.batch.column("cause"), "")).as_py() or 0)

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < self._length:
            raise IndexError(f"row {index} of {self._length}")
        return Row._make([read(index) for read in self._columns])


def _reader(column: pa.Array) -> Any:
    """A function of the row; several times as fast as Arrow's own access to single values."""
    if column.type == pa.int64():
        return memoryview(column.buffers()[1]).cast("q").__getitem__
    _, offsets, data = column.buffers()
    bounds, content = memoryview(offsets).cast("q"), memoryview(data or b"")

    def read(index: int) -> str:
        first, end = bounds[index], bounds[index + 1]
        return str(content[first:end], "utf8") if end > first else ""

    return read
