"""Tables of rows kept off the Python heap: written once as Arrow files, then memory-mapped.

All workers of a machine share the files' pages, so that ten million rows cost each of them next to
nothing. A table has a column for each field of ``Row`` that any of its rows has a value in.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import pyarrow as pa

from engine.data.cache import cached_file
from engine.errors import UserError
from engine.types import BadSample, EncodedImage, Place, Row

FORM = 5  # of tables; raised when their content changes
BLOCK_BYTES = 4 << 20  # written at once, roughly: the unit in which a table is read through
ROWS = 32_768  # written at once at most
TURN = pa.struct([("role", pa.string()), ("text", pa.string())])
# A file inside the image folder by its path, or bytes inside one of the table's files.
PLACE = pa.struct(
    [("path", pa.string()), ("file", pa.int32()), ("offset", pa.int64()), ("size", pa.int64())]
)
_KINDS = {
    "str": pa.string(),
    "str | None": pa.string(),
    "int | None": pa.int64(),
    "tuple[str, ...]": pa.list_(pa.string()),
    "tuple[Turn, ...]": pa.list_(TURN),
    "tuple[EncodedImage, ...]": pa.list_(PLACE),
}
SCHEMA = pa.schema([(field.name, _KINDS[str(field.type)]) for field in fields(Row)])
Stored = tuple[str | None, int, int, int]
"""An image as a table has it: ``PLACE``."""


class Block:
    """A table's record batch, from which single rows are read several times as fast as by Arrow."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        names = batch.schema.names
        self.read = {
            name: _reader(batch.column(name)) if name in names else _nothing
            for name in SCHEMA.names
        }
        self._all = list(self.read.values())

    def row(self, index: int) -> list[Any]:
        """Values of all fields, None where there is none."""
        return [read(index) for read in self._all]


def _nothing(index: int) -> None:
    return None


def _reader(column: pa.Array) -> Callable[[int], Any]:
    """A function of the row: its value, None for none and for empty lists."""
    kind, nulls = column.type, column.null_count
    if nulls == len(column):
        return _nothing
    present, *buffers = column.buffers()
    read: Callable[[int], Any]
    if pa.types.is_struct(kind):
        names = [field.name for field in (TURN if kind.get_field_index("role") >= 0 else PLACE)]
        places = [kind.get_field_index(name) for name in names]
        children = [_nothing if at < 0 else _reader(column.field(at)) for at in places]
        read = lambda index: tuple([child(index) for child in children])  # noqa: E731
    elif pa.types.is_integer(kind):
        read = _integers(buffers[0], kind.bit_width == 64).__getitem__
    else:
        wide = pa.types.is_large_string(kind) or pa.types.is_large_list(kind)
        bounds = _integers(buffers[0], wide)
        if pa.types.is_list(kind) or pa.types.is_large_list(kind):
            read = _list_reader(bounds, _reader(column.values))
            nulls = 0  # a list that is null is empty too
        else:
            read = _text_reader(bounds, memoryview(buffers[1] or b""))
    if not nulls:
        return read
    bits = memoryview(present)
    return lambda index: read(index) if bits[index >> 3] >> (index & 7) & 1 else None


def _integers(buffer: pa.Buffer, wide: bool) -> memoryview[int]:
    held = memoryview(buffer)
    return held.cast("q") if wide else held.cast("i")


def _text_reader(bounds: memoryview[int], content: memoryview) -> Callable[[int], str]:
    def read(index: int) -> str:
        first, end = bounds[index], bounds[index + 1]
        return str(content[first:end], "utf8") if end > first else ""

    return read


def _list_reader(bounds: memoryview[int], item: Callable[[int], Any]) -> Callable[[int], Any]:
    def read(index: int) -> tuple[Any, ...] | None:
        first, end = bounds[index], bounds[index + 1]
        return tuple([item(place) for place in range(first, end)]) if end > first else None

    return read


class Table:
    """Rows of an Arrow file, read through a memory map; pickled as a path.

    Raises OSError or ValueError (of which Arrow's are kinds) for a file that is not a table.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with pa.memory_map(str(path)) as file:
            opened = pa.ipc.open_file(file)
            self.batches = [opened.get_batch(n) for n in range(opened.num_record_batches)]
        self.schema = opened.schema
        if unknown := set(self.schema.names) - set(SCHEMA.names):
            raise ValueError(f"{path} is not a table of this version: {', '.join(unknown)}")
        self._ends = list(accumulate(batch.num_rows for batch in self.batches))
        self._blocks: list[Block | None] = [None] * len(self.batches)

    def __reduce__(self) -> tuple[type[Table], tuple[Path]]:
        return Table, (self.path,)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def at(self, index: int) -> tuple[Block, int]:
        """The block of a row, and its number there. Raises IndexError."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)} in {self.path}")
        number = bisect_right(self._ends, index)
        block = self._blocks[number]
        if block is None:
            block = self._blocks[number] = Block(self.batches[number])
        return block, index - (self._ends[number - 1] if number else 0)

    def column(self, name: str) -> Iterator[pa.Array]:
        """A column's arrays in order, a batch each; nulls where the table has no such column."""
        for batch in self.batches:
            there = name in batch.schema.names
            yield batch.column(name) if there else pa.nulls(len(batch), SCHEMA.field(name).type)

    def has_values(self, name: str) -> bool:
        """Whether any row has a value in the column."""
        return any(array.null_count < len(array) for array in self.column(name))

    def values(self, name: str) -> Iterator[Any]:
        """A column's values in order, some thousands in memory at a time."""
        for array in self.column(name):
            for start in range(0, len(array), 8192):
                yield from array.slice(start, 8192).to_pylist()

    @property
    def num_faults(self) -> int:
        """Rows that cannot be used."""
        return sum(len(array) - array.null_count for array in self.column("cause"))


def open_table(
    inputs: Sequence[Path],
    options: object,
    batches: Callable[[], Iterable[pa.RecordBatch]],
    *,
    cache_dir: Path,
) -> Table:
    """The table of ``batches()``, which were made of ``inputs`` and ``options``: written once.

    Raises UserError where there are no rows, or none that can be used, and what ``batches`` raises.
    """

    def write(temporary: Path) -> None:
        write_table(temporary, batches())
        table = Table(temporary)
        if not len(table):
            raise UserError(f"{inputs[0]} has no samples in it")
        if table.num_faults == len(table):
            block, _ = table.at(0)
            first = f"{block.read['cause'](0)}: {block.read['detail'](0)}".removesuffix(": None")
            raise UserError(f"no sample of {inputs[0]} can be used; the first: {first}")

    key = FORM, options
    return Table(cached_file(inputs, key, write, cache_dir=cache_dir, ending="arrow"))


def write_table(path: Path, batches: Iterable[pa.RecordBatch]) -> None:
    """Write record batches of one schema, that of the first."""
    batches = iter(batches)
    first = next(batches, None)
    schema = SCHEMA if first is None else first.schema
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, schema) as writer:
        for batch in chain([] if first is None else [first], batches):
            writer.write_batch(batch)


def to_batches(rows: Iterable[Row], held_in: Sequence[Path] = ()) -> Iterator[pa.RecordBatch]:
    """Rows as a format makes them, some thousands at a time, as record batches of ``SCHEMA``.

    Places of images are in the files ``held_in``.
    """
    numbers = {str(path): number for number, path in enumerate(held_in)}
    batch: list[Row] = []
    size = 0
    for row in rows:
        batch.append(row)
        size += sum(map(len, texts_of(row)))
        if len(batch) == ROWS or size >= BLOCK_BYTES:
            yield _to_batch(batch, numbers)
            batch, size = [], 0
    if batch:
        yield _to_batch(batch, numbers)


def _to_batch(rows: list[Row], files: Mapping[str, int]) -> pa.RecordBatch:
    def stored(image: EncodedImage) -> tuple[Any, ...]:
        assert isinstance(image, Place)
        if not image.file:
            return image.shown, None, None, None
        return image.shown or None, files[image.file], image.offset, image.size

    arrays = []
    for field in SCHEMA:
        values = [getattr(row, field.name) for row in rows]
        if field.name == "images":
            values = [[stored(image) for image in images] or None for images in values]
        elif field.name not in ("label", "question", "caption"):
            values = [value or None for value in values]
        arrays.append(pa.array(values, field.type))
    return pa.record_batch(arrays, schema=SCHEMA)


def texts_of(row: Row) -> list[str]:
    """All texts of a row as a format makes it."""
    texts = [row.key, row.caption, row.image_id, row.caption_id, row.question or ""]
    texts += [row.question_type, row.answer_type, *row.answers, *row.labels]
    texts += [text for _, text in row.turns]
    texts += [image.shown for image in row.images if isinstance(image, Place)]
    return texts


def file_named(name: str) -> Place:
    """A file inside the image folder, as a format has it in its rows."""
    return Place("", 0, 0, name)


def row_or_fault(where: str, make: Callable[..., Row], *arguments: Any) -> Row:
    """What ``make(*arguments)`` returns, or the row of a sample that cannot be used where it raises
    BadSample; ``where`` names it in the file."""
    try:
        row = make(*arguments)
        # Lone surrogates: bytes that are not UTF-8, or escapes that are not characters.
        "".join(texts_of(row)).encode()
    except BadSample as bad:
        detail = f"{where}: {bad.detail}".encode(errors="replace").decode()
        return Row(cause=bad.cause, detail=detail)
    except UnicodeEncodeError:
        return Row(cause="not text", detail=where)
    return row
