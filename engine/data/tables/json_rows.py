"""JSON files read as streams of entries: a list of any length, a list under a key, or JSON lines.

The files may be hostile. An entry is held in memory one at a time and bounded in size; what is not
JSON, nests too deeply or holds endless digits is a UserError that names the file and the entry, or,
in JSON lines, an entry with a fault. Bytes that are no UTF-8 become lone surrogates in its texts.
"""

from __future__ import annotations

import codecs
import gzip
import json
import os
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn

from engine.errors import UserError

MAX_ENTRY = 64 << 20  # characters of one entry
_READ_BYTES = 1 << 20
_SPACES = " \t\n\r"
_SPACE = re.compile(r"[ \t\n\r]*")
_DECODER = json.JSONDecoder()
# An error nearer to the end of what is read than this may only mean that more is to be read.
_NEAR_END = 16


class Entry(NamedTuple):
    """One entry: its number from 1 on, its value or what is wrong with it, its place in bytes."""

    number: int
    value: Any
    offset: int
    extent: int
    fault: str | None = None


def read_list(path: Path, section: str) -> Iterator[Entry]:
    """Entries of the list under the key ``section`` of a file that is one object.

    Raises UserError where there is no such list, with the keys that there are.
    """
    with _stream(path) as stream:
        if stream.peek() != "{":
            raise UserError(f"{path} is not a JSON object with {section!r} in it")
        keys = []
        for key in stream.read_keys():
            keys.append(key)
            if key == section:
                if stream.peek() != "[":
                    raise UserError(f"{section!r} of {path} is not a list")
                yield from stream.items(f"{section} ")
            else:
                stream.skip()
    if section not in keys:
        found = ", ".join(keys) or "none"
        raise UserError(f"{path} has no list {section!r}; its keys: {found[:300]}")


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


def read_entry(descriptor: int, offset: int, extent: int) -> Any:
    """An entry read again from its place. Raises ValueError where it is none any more."""
    return json.loads(_unpacked(os.pread(descriptor, extent, offset)))


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
        self.window, self.at = "", 0
        self.offset = 0  # in bytes, of the window's place ``at``
        self.ended = False
        self.where = ""  # the entry that is being read, for messages
        while not (self.window or self.ended):
            self._more()
        if self.window.startswith("\ufeff"):
            self._advance(1)

    def peek(self) -> str:
        """The next character that is no space; empty at the file's end."""
        while True:
            mark = self.window[self.at : self.at + 1]
            if not mark or mark in _SPACES:
                if match := _SPACE.match(self.window, self.at):
                    self._advance(match.end())
                mark = self.window[self.at : self.at + 1]
            if mark or self.ended:
                return mark
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
        for number in self._members("[", "]"):
            self.where = f"{what}entry {number}"
            yield Entry(number, *self.value())
        self.where = ""

    def skip(self) -> None:
        """Pass over the value that comes next."""
        if self.peek() != "[":
            self.value()
            return
        for _ in self._members("[", "]"):
            self.value()

    def end(self) -> None:
        """Nothing may follow the list."""
        if self.peek():
            self._fail(f"more follows the end of the list at byte {self.offset}")

    def value(self) -> tuple[Any, int, int]:
        """The value that comes next, its offset and its length in bytes."""
        self.peek()
        while True:
            try:
                value, end = _DECODER.raw_decode(self.window, self.at)
            except RecursionError:
                self._fail("it nests too deeply")
            except json.JSONDecodeError as error:
                open_string = error.msg.startswith("Unterminated string")
                near_end = error.pos >= len(self.window) - _NEAR_END
                if self.ended or not (open_string or near_end):
                    self._fail(f"{error.msg} at byte {self._byte(error.pos)}")
            except ValueError as error:  # an integer of thousands of digits
                self._fail(str(error))
            else:
                if end < len(self.window) or self.ended:
                    start = self.offset
                    self._bounded(end - self.at)
                    self._advance(end)
                    return value, start, self.offset - start
            self._more()

    def _members(self, opening: str, closing: str) -> Iterator[int]:
        """Numbers from 1 on, while the caller reads the members one by one."""
        assert self.peek() == opening
        self._advance(self.at + 1)
        number = 0
        if self.peek() == closing:
            self._advance(self.at + 1)
            return
        while True:
            number += 1
            yield number
            mark = self.peek()
            if mark not in (",", closing):
                self._fail(f"a comma or {closing} is wanted at byte {self.offset}")
            self._advance(self.at + 1)
            if mark == closing:
                return

    def _advance(self, at: int) -> None:
        if at != self.at:
            self.offset, self.at = self._byte(at), at

    def _byte(self, at: int) -> int:
        passed = self.window[self.at : at]
        units = passed if passed.isascii() else passed.encode(errors="surrogateescape")
        return self.offset + len(units)

    def _more(self) -> None:
        """Drop what is passed, and read as much as is held, so that a long value is soon whole."""
        held = self._bounded(len(self.window) - self.at)
        data = self.file.read(max(_READ_BYTES, held))
        self.ended = not data
        self.window = self.window[self.at :] + self.decode(data, final=self.ended)
        self.at = 0

    def _bounded(self, length: int) -> int:
        if length > MAX_ENTRY:
            self._fail(f"it is longer than {MAX_ENTRY} characters")
        return length

    def _fail(self, why: str) -> NoReturn:
        where = f", {self.where}" if self.where else ""
        raise UserError(f"{self.path}{where}: not JSON that can be read: {why}")
