"""Images that lie in Arrow stream files as bytes or base64 text, read from their places.

Nothing is held of a file but its memory map: a row's place names the record batch's offset in the
file and the row in the batch.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from engine.data.tables.json_images import decode_base64
from engine.errors import UserError
from engine.types import BadSample

_MAX_OPEN = 64  # memory maps that one process keeps


def open_stream(path: Path) -> tuple[pa.Buffer, pa.Schema, int]:
    """A mapped Arrow stream file: its bytes, its schema and the offset of its first record batch.

    Raises UserError for any other file.
    """
    try:
        with pa.memory_map(str(path)) as file:
            data = file.read_buffer()
        reader = pa.BufferReader(data)
        schema = pa.ipc.read_schema(pa.ipc.read_message(reader))
    except (pa.ArrowException, EOFError, OSError) as error:
        raise UserError(f"cannot read {path} as an Arrow stream: {error}") from error
    if nested := next((f.name for f in schema if pa.types.is_dictionary(f.type)), None):
        raise UserError(f"column {nested!r} of {path} is dictionary-encoded, which is not read")
    return data, schema, reader.tell()


def read_batches(path: Path) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Row batches of an Arrow stream file, checked, each with its offset in bytes.

    Raises UserError, naming the file and the offset, for what is truncated or corrupt.
    """
    data, schema, offset = open_stream(path)
    while offset < len(data):
        try:
            batch, end = _batch_at(data, schema, offset)
            if batch is not None:
                batch.validate(full=True)
        except (pa.ArrowException, EOFError, OSError) as error:
            raise UserError(f"{path} is corrupt at byte {offset}: {error}") from error
        if batch is None:
            return
        yield offset, batch
        offset = end
    raise UserError(f"{path} is cut off: an Arrow stream ends with a mark")


def _batch_at(data: pa.Buffer, schema: pa.Schema, offset: int) -> tuple[pa.RecordBatch | None, int]:
    """The batch at an offset and where it ends; no batch at the stream's end."""
    reader = pa.BufferReader(data.slice(offset))
    try:
        message = pa.ipc.read_message(reader)
    except EOFError:
        return None, offset
    return pa.ipc.read_record_batch(message, schema), offset + reader.tell()


class ArrowImages:
    """An ``ImageStore``: images in ``column`` of a row of Arrow stream files; pickled as paths.

    The column holds bytes, base64 texts, structs ``{bytes, path}``, or lists of these.
    """

    def __init__(self, paths: Sequence[Path], column: str) -> None:
        self.paths, self.column = list(paths), column
        self._opened: OrderedDict[int, tuple[pa.Buffer, pa.Schema]] = OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self) -> tuple[list[Path], str]:
        return self.paths, self.column

    def __setstate__(self, state: tuple[list[Path], str]) -> None:
        self.__init__(*state)  # type: ignore[misc]

    def read(self, file: int, offset: int, extent: int, count: int) -> tuple[bytes, ...]:
        """The bytes of the first images in row ``extent`` of the batch at ``offset``.

        BadSample where the file has changed, or what it holds is no image.
        """
        path = self.paths[file]
        try:
            data, schema = self._file(file)
            batch, _ = _batch_at(data, schema, offset)
            assert batch is not None
            value = batch.column(schema.get_field_index(self.column))[extent].as_py()
        except (pa.ArrowException, AssertionError, IndexError, EOFError, OSError) as error:
            raise BadSample("unreadable", f"{path} at byte {offset}: {error}") from error
        except UserError as error:
            raise BadSample("unreadable", str(error)) from error
        values = value if isinstance(value, list) else [value]
        if len(values) < count:
            raise BadSample("missing", "the cell holds no image")
        return tuple(map(image_bytes, values[:count]))

    def _file(self, file: int) -> tuple[pa.Buffer, pa.Schema]:
        with self._lock:
            if file not in self._opened:
                data, schema, _ = open_stream(self.paths[file])
                self._opened[file] = (data, schema)
                if len(self._opened) > _MAX_OPEN:
                    self._opened.popitem(last=False)
            self._opened.move_to_end(file)
            return self._opened[file]


def image_bytes(value: Any) -> bytes:
    """The encoded image of a cell; BadSample where there is none."""
    if isinstance(value, dict):
        value = value.get("bytes")
    if isinstance(value, str):
        value = decode_base64(value)
    if not isinstance(value, bytes):
        raise BadSample("missing", "the cell holds no image")
    return value
