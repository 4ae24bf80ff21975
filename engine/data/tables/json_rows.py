"""JSON files read as streams of entries: a list of any length, a list under a key, or JSON lines.

The files may be hostile. An entry is held in memory one at a time and bounded in size; what is not
JSON, nests too deeply or holds endless digits is a UserError that names the file and the entry, or,
in JSON lines, an entry with a fault. Bytes that are not UTF-8 become lone surrogates in its texts.
"""

from __future__ import annotations

import codecs
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn

from engine.data.tables.table import row_or_fault
from engine.data.tables.values import identity, mapping, required, string
from engine.errors import UserError
from engine.types import BadSample, Row

MAX_ENTRY = 64 << 20  # characters of one entry
_READ_BYTES = 1 << 20
_SPACE = re.compile(r"[ \t\n\r]*")
_COMMA = re.compile(r"[ \t\n\r]*,[ \t\n\r]*")
_DECODER = json.JSONDecoder()
_SCAN: Callable[[str, int], tuple[Any, int]] = vars(_DECODER)["scan_once"]
# An error nearer to the end of what is read than this may only mean that more is to be read.
_NEAR_END = 16


class Entry(NamedTuple):
    """One entry: its number from 1 on, its value or what is wrong with it, its place in bytes."""

    number: int
    value: Any
    offset: int
    extent: int
    fault: str | None = None

    def object(self, what: str) -> Mapping[str, Any]:
        """Its value, which messages call ``what``. Raises BadSample where it is not an object."""
        if self.fault:
            raise BadSample("malformed", self.fault)
        return mapping(self.value, what)


def read_list(path: Path, section: str) -> Iterator[Entry]:
    """Entries of the list under the key ``section`` of a file that is one object.

    Raises UserError where there is no such list, naming its keys.
    """
    with _stream(path) as stream:
        if stream.peek() != "{":
            raise UserError(f"{path} is not a JSON object with {section!r} in it")
        keys = []
        for key in stream.read_keys():
            keys.append(key)
            if stream.peek() == "[":
                for entry in stream.items(f"{key} "):
                    if key == section:
                        yield entry
            elif key == section:
                raise UserError(f"{section!r} of {path} is not a list")
            else:
                stream.value()
    if section not in keys:
        found = ", ".join(keys) or "none"
        raise UserError(f"{path} has no list {section!r}; its keys: {found[:300]}")


def read_names(
    path: Path, section: str, one: str, field: str, *, strict: bool = False
) -> dict[str, str]:
    """Ids and texts ``field`` of the entries of a list, each of which messages call ``one``.

    Entries that lack either are left out. Raises UserError where one id has two texts, and for
    what would be left out where ``strict``.
    """
    names: dict[str, str] = {}
    for entry in read_list(path, section):
        where = f"{path}, {one} {entry.number}"
        try:
            value = entry.object(f"the {one}")
            own = identity(required(value, "id"), "the id")
            name = string(required(value, field), f"the {field}")
        except BadSample as bad:
            if strict:
                raise UserError(f"{where}: {bad}") from None
            continue
        if names.setdefault(own, name) != name:
            raise UserError(f"{where}: id {own[:60]!r} belongs to {names[own]!r} already")
    return names


def rows_of(
    entries: Iterable[Entry], what: str, make: Callable[..., Row], *arguments: Any
) -> Iterator[Row]:
    """``make(entry, *arguments)`` of each entry, or why it cannot be used (``row_or_fault``)."""
    for entry in entries:
        yield row_or_fault(f"{what} {entry.number}", make, entry, *arguments)


def is_object(path: Path) -> bool:
    """Whether the file is one object, and not a list or lines."""
    with _stream(path) as stream:
        return stream.peek() == "{"


def read_rows(path: Path) -> Iterator[Entry]:
    """Entries of a file that is one list, or has one JSON value on each line."""
    with _stream(path) as stream:
        if stream.peek() == "[":
            yield from stream.items()
            stream.end()
            return
        if not stream.peek():
            raise UserError(f"{path} is empty")
    with _opened(path) as file:
        yield from _lines(path, file)


def _unpacked(line: bytes) -> str:
    return line.removeprefix(codecs.BOM_UTF8).decode(errors="surrogateescape")


def _lines(path: Path, file: BinaryIO) -> Iterator[Entry]:
    offset, number = 0, 0
    while line := file.readline(MAX_ENTRY):
        start, extent = offset, len(line)
        offset += extent
        fault, value = None, None
        if not line.endswith(b"\n") and extent == MAX_ENTRY:
            fault = f"longer than {MAX_ENTRY} bytes"
            while (rest := file.readline(MAX_ENTRY)) and not rest.endswith(b"\n"):
                offset += len(rest)
            offset += len(rest)
        elif line.isspace():
            continue
        else:
            try:
                value = json.loads(_unpacked(line))
            except RecursionError:
                fault = "nests too deeply"
            except ValueError as error:
                fault = f"not JSON: {error}"
        number += 1
        yield Entry(number, value, start, extent, fault)


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """The file's bytes, unpacked where its name ends in ``.gz``."""
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            yield file  # type: ignore[misc]
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path} is not a whole gzip file: {error}") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


@contextmanager
def _stream(path: Path) -> Iterator[_Stream]:
    with _opened(path) as file:
        yield _Stream(path, file)


class _Stream:
    """Values of a JSON text one after another, through a window that slides over the file."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self.file = path, file
        self.decode = codecs.getincrementaldecoder("utf-8")(errors="surrogateescape").decode
        self.window, self.at, self.is_ascii = "", 0, True
        self.offset = 0  # in bytes, of the window's place ``at``
        self.ended = False
        self.what, self.number = "", 0  # the entry that is being read, for messages
        while not (self.window or self.ended):
            self._more()
        if self.window.startswith("\ufeff"):
            self._advance(1)

    def peek(self) -> str:
        """The next character that is not a space; empty at the file's end."""
        while True:
            match = _SPACE.match(self.window, self.at)
            assert match is not None
            self._advance(match.end())
            if self.at < len(self.window) or self.ended:
                return self.window[self.at : self.at + 1]
            self._more()

    def read_keys(self) -> Iterator[str]:
        """Keys of the object that comes next; the caller reads each one's value."""
        for _ in self._members("{", "}"):
            key, _, _ = self.value()
            if not isinstance(key, str) or self.peek() != ":":
                self._fail("a key and a colon are wanted")
            self._advance(self.at + 1)
            yield key

    def items(self, what: str = "") -> Iterator[Entry]:
        """Entries of the list that comes next."""
        self.what = what
        for _ in self._members("[", "]"):
            self.number += 1
            yield Entry(self.number, *self.value())
            yield from self._plain_items()
        self.number = 0

    def _plain_items(self) -> Iterator[Entry]:
        """The next entries that are whole in the window, as ``items`` has them, in a third of the
        time; up to one that is not, or cannot be read."""
        window, size = self.window, len(self.window)
        while self.is_ascii and (comma := _COMMA.match(window, self.at)):
            start = comma.end()
            try:
                value, end = _SCAN(window, start)
            except (StopIteration, ValueError, RecursionError):
                return
            if end == size or end - start > MAX_ENTRY:
                return
            offset = self.offset + start - self.at
            self.number, self.offset, self.at = self.number + 1, offset + end - start, end
            yield Entry(self.number, value, offset, end - start)

    def end(self) -> None:
        """Nothing may follow the list."""
        if self.peek():
            self._fail(f"more follows the end of the list at byte {self.offset}")

    def value(self) -> tuple[Any, int, int]:
        """The value that comes next, its offset and its length in bytes."""
        while True:
            self.peek()
            try:
                value, end = _DECODER.raw_decode(self.window, self.at)
            except RecursionError:
                self._fail("it nests too deeply")
            except json.JSONDecodeError as error:
                open_string = error.msg.startswith("Unterminated string")
                near_end = error.pos >= len(self.window) - _NEAR_END
                if self.ended or not (open_string or near_end):
                    place = self.offset + self._num_bytes(error.pos)
                    self._fail(f"{error.msg} at byte {place}")
            except ValueError as error:  # an integer of thousands of digits
                self._fail(str(error))
            else:
                if end < len(self.window) or self.ended:
                    start = self.offset
                    self._bounded(end - self.at)
                    self._advance(end)
                    return value, start, self.offset - start
            self._more()

    def _members(self, opening: str, closing: str) -> Iterator[None]:
        """A turn for each member, while the caller reads them one by one."""
        assert self.peek() == opening
        self._advance(self.at + 1)
        if self.peek() == closing:
            self._advance(self.at + 1)
            return
        while True:
            yield
            mark = self.peek()
            if mark not in (",", closing):
                self._fail(f"a comma or {closing} is wanted at byte {self.offset}")
            self._advance(self.at + 1)
            if mark == closing:
                return

    def _advance(self, at: int) -> None:
        self.offset += self._num_bytes(at)
        self.at = at

    def _num_bytes(self, at: int) -> int:
        """Bytes from where the stream is up to a place in the window."""
        if self.is_ascii:
            return at - self.at
        return len(self.window[self.at : at].encode(errors="surrogateescape"))

    def _more(self) -> None:
        """Drop what is passed, and read as much as is held, so that a long value is soon whole."""
        held = self._bounded(len(self.window) - self.at)
        data = self.file.read(max(_READ_BYTES, held))
        self.ended = not data
        self.window = self.window[self.at :] + self.decode(data, final=self.ended)
        self.is_ascii = self.window.isascii()
        self.at = 0

    def _bounded(self, length: int) -> int:
        if length > MAX_ENTRY:
            self._fail(f"it is longer than {MAX_ENTRY} characters")
        return length

    def _fail(self, why: str) -> NoReturn:
        where = f", {self.what}entry {self.number}" if self.number else ""
        raise UserError(f"{self.path}{where}: not JSON that can be read: {why}")
