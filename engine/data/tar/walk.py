"""The members of a tar file by their offsets, found by walking its headers with plain reads.

Reads ustar, GNU and pax archives without unpacking anything, checks every header's sum, and
continues at the next whole header after a damaged one. Nothing here reads a member's bytes that is
not asked to, so a link, a device or a hostile name is a row in a list and nothing more.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from zlib import adler32

import numpy as np

BLOCK = 512
_RECORD = 10_240  # tar files end on a multiple of this, or right after their two zero blocks
_WINDOW = 8192  # bytes; it mostly holds the small members between two images
_FIRST_SCAN_BYTES, _MAX_SCAN_BYTES = 4096, 1 << 20
_MAX_LONG_BYTES = 1 << 20  # of a long name or pax header
_ZERO = bytes(BLOCK)
_LINKS = {ord("1"): "hard link", ord("2"): "symbolic link"}
_DEVICES = {ord("3"): "device", ord("4"): "device", ord("6"): "pipe"}
_PACKED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ": "xz"}
_FOLDER, _PAX, _LONG_NAME, _NEWLINE = ord("5"), ord("x"), ord("L"), ord("\n")
_WITHOUT_DATA = {*_LINKS, *_DEVICES, _FOLDER}
_FILE = ord("0")
_FILES = (0, _FILE, ord("7"))

_SUMS: dict[bytes, int] = {}  # what Adler-32's low half is where a header says this sum
_MAX_SUMS = 1 << 16
_OCTAL = re.compile(rb"[0-7]+")
_ADLER = 65_521

Member = tuple[str, int, int, str, str]
"""A member's name, the offset of its first byte, its size in bytes, and why it cannot be used: the
cause and the detail, both empty for a plain file that is wholly there. Without a name: damage of
the archive at that offset (empty shard, truncated shard, torn header), where no member is found."""


class Window:
    """Reads of a file at any place; those close together are served by one call."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor, self.start, self.bytes = descriptor, 0, b""

    def move(self, start: int) -> bytes:
        """The window's new bytes, which begin at ``start``; empty where the file has ended."""
        self.start, self.bytes = start, os.pread(self._descriptor, _WINDOW, start)
        return self.bytes

    def read(self, start: int, size: int) -> bytes:
        """``size`` bytes from ``start``, fewer where the file ends; the window may stay."""
        at = start - self.start
        if at >= 0 and at + size <= len(self.bytes):
            return self.bytes[at : at + size]
        return os.pread(self._descriptor, size, start)


def walk(window: Window, file_size: int) -> Iterator[Member]:
    """All members in order, and the damage between them. Never raises for what the file holds.

    The end of an archive is two zero blocks and, at most, zeros up to a multiple of 10,240 bytes.
    Anything else at the end is damage, since a cut leaves it so.
    """
    others = _OtherHeaders(window, file_size)
    known_sum = _SUMS.get
    at, first, held, last = 0, 0, b"", -1
    while at >= 0:
        begin = at - first
        if begin > last:
            begin, first, held = 0, at, window.move(at)
            last = len(held) - BLOCK
        header = held[begin : begin + BLOCK]
        # What _size_in and _OtherHeaders do for all headers, in half the time for nearly all.
        if known_sum(header[148:156]) == adler32(header) & 0xFFFF and last >= 0:
            kind, start = header[156], at + BLOCK
            try:
                size = -1 if header[135] else int(header[124:135], 8)
            except ValueError:
                size = -1
            if kind == _FILE and 0 <= size <= file_size - start and not others.given:
                if header[99] or header[345]:
                    name = _name_in(header)
                else:
                    name = header[: header.find(0)].decode("utf8", "backslashreplace")
                yield name, start, size, "", ""
                at = start + (size + 511 & -512)
                continue
            if kind == _PAX:
                content = held[begin + BLOCK : begin + BLOCK + size]
                # A time in fractions of a second alone, as Python's tarfile writes for each member.
                if content[2:9] == b" mtime=" and content.find(_NEWLINE) == size - 1:
                    at = start + (size + 511 & -512)
                    continue
        member, at = others.read(header, at)
        if member is not None:
            yield member


class _OtherHeaders:
    """Headers of any kind, one after the other, and what is found where no header is.

    ``given`` are the name and size that long headers have given for the member to come.
    """

    def __init__(self, window: Window, file_size: int) -> None:
        self.window, self.file_size = window, file_size
        self.given: tuple[str, int] | None = None

    def read(self, header: bytes, at: int) -> tuple[Member | None, int]:
        """What the header at ``at`` says, and where the next one is; -1 at the archive's end."""
        size = _size_in(header)
        if size < 0:
            return self._damage(header, at)
        kind, start = header[156], at + BLOCK
        member: Member | None = None
        if kind in (_PAX, _LONG_NAME):
            member = self._long(header, start, size)
        else:
            name, above = self.given or ("", 0)
            name, size, self.given = name or _name_in(header), above or size, None
            if kind != _FOLDER:
                member = _member(header, name, start, size, self.file_size)
            if kind in _WITHOUT_DATA:
                size = 0
        return member, start + (size + 511 & -512)

    def _long(self, header: bytes, start: int, size: int) -> Member | None:
        content = self.window.read(start, min(size, _MAX_LONG_BYTES))
        given = _long_header(content, header[156]) if len(content) == size else None
        if given is not None:
            before = self.given or ("", 0)
            self.given = given[0] or before[0], given[1] or before[1]
            return None
        if start + size > self.file_size:
            return None  # and there the archive will be found cut
        at = start - BLOCK
        return "", at, 0, "torn header", f"the long header at byte {at} is malformed"

    def _damage(self, header: bytes, at: int) -> tuple[Member | None, int]:
        self.given = None
        damage = _damage(self.window, header, at, self.file_size)
        if damage is None:
            return None, -1
        goes_on = damage[0] == "torn header"
        return ("", at, 0, *damage), _next(self.window, at, self.file_size) if goes_on else -1


def _member(header: bytes, name: str, start: int, size: int, file_size: int) -> Member:
    kind = header[156]
    if kind in _FILES:
        missing = start + size - file_size
        if missing <= 0:
            return name, start, size, "", ""
        detail = f"{missing} of its {size} bytes are missing"
        return name, start, size, "truncated shard", detail
    if kind in _LINKS:
        to = header[157:257].split(b"\0", 1)[0].decode("utf8", "backslashreplace")
        return name, start, 0, "link", f"{_LINKS[kind]} to {to}"
    return name, start, size, "not a file", _DEVICES.get(kind, f"tar type {chr(kind)!r}")


def _damage(window: Window, header: bytes, at: int, file_size: int) -> tuple[str, str] | None:
    """Cause and detail where no header is; None at a proper end."""
    if not file_size:
        return "empty shard", "0 bytes"
    if len(header) < BLOCK:
        return "truncated shard", f"it ends at byte {file_size}, without an end mark"
    packed = [name for start, name in _PACKED.items() if header.startswith(start)]
    if packed and not at:
        return "compressed shard", f"{packed[0]}; unpack it, so that it can be read by row"
    if header != _ZERO:
        return "torn header", f"no valid header at byte {at}"
    return _end(window, at, file_size)


def _end(window: Window, at: int, file_size: int) -> tuple[str, str] | None:
    """What is wrong with an end mark that begins at ``at``; None where nothing is."""
    end = at + 2 * BLOCK
    if end > file_size:
        return "truncated shard", f"it ends at byte {file_size}, inside its end mark"
    if window.read(at + BLOCK, BLOCK) != _ZERO:
        return "torn header", f"a lone zero block at byte {at}"
    for _, rest in _chunks(window, end, file_size):
        if rest.strip(b"\0"):
            return "torn header", f"more data after the end mark at byte {at}"
    padding = file_size - at - 2 * BLOCK
    if padding and (file_size % _RECORD or padding >= _RECORD):
        return "truncated shard", f"{padding} zero bytes after its end mark"
    return None


def _next(window: Window, at: int, file_size: int) -> int:
    """Where the next whole header after ``at`` is, of those that carry tar's name; -1: nowhere."""
    for start, chunk in _chunks(window, at + BLOCK, file_size):
        blocks = np.frombuffer(chunk, np.uint8, len(chunk) // BLOCK * BLOCK).reshape(-1, BLOCK)
        named = (blocks[:, 257:262] == np.frombuffer(b"ustar", np.uint8)).all(1)
        for number in np.flatnonzero(named).tolist():
            if _size_in(chunk[number * BLOCK : (number + 1) * BLOCK]) >= 0:
                return start + number * BLOCK
    return -1


def _chunks(window: Window, start: int, file_size: int) -> Iterator[tuple[int, bytes]]:
    """All bytes from ``start`` on with their places; few at first, since most searches end soon."""
    size = _FIRST_SCAN_BYTES
    while start < file_size and (chunk := window.read(start, size)):
        yield start, chunk
        start += len(chunk)
        size = min(2 * size, _MAX_SCAN_BYTES)


def _size_in(header: bytes) -> int:
    """The size in a header; -1 where it is not a header.

    The low half of Adler-32 is one more than the sum of all bytes (modulo 65,521), and ten times as
    fast as adding them up. A header's own sum counts as eight spaces.
    """
    if len(header) < BLOCK:
        return -1
    own = header[148:156]
    if own not in _SUMS:
        if len(_SUMS) >= _MAX_SUMS:
            _SUMS.clear()
        digits = own.split(b"\0", 1)[0].strip()
        valid = _OCTAL.fullmatch(digits)
        _SUMS[own] = (int(digits, 8) - 255 + sum(own)) % _ADLER if valid else -1
    if adler32(header) & 0xFFFF != _SUMS[own] and not _signed_sum_is(header, _SUMS[own]):
        return -1
    field = header[124:136]
    if field[0] == 0x80:  # base 256: GNU's form from 8 GiB on
        size = int.from_bytes(field[1:], "big")
        return size if size < 1 << 62 else -1
    digits = field.split(b"\0", 1)[0].strip()
    return (int(digits, 8) if _OCTAL.fullmatch(digits) else -1) if digits else 0


def _signed_sum_is(header: bytes, total: int) -> bool:
    """Whether ``total`` counts bytes from 128 on as negative, as some old writers did."""
    high = sum(byte > 127 for byte in header)
    return high > 0 and ((adler32(header) & 0xFFFF) - 256 * high) % _ADLER == total


def _name_in(header: bytes) -> str:
    """The member's name; bytes that are not UTF-8 are spelled out."""
    end = header.find(0, 0, 100)
    name = header[: end if end >= 0 else 100]
    # GNU's own form (magic "ustar  ") keeps times where ustar keeps a folder.
    if header[345] and header[257:263] == b"ustar\0":
        name = header[345:500].split(b"\0", 1)[0] + b"/" + name
    return name.decode("utf8", "backslashreplace")


def _long_header(content: bytes, kind: int) -> tuple[str, int] | None:
    """Name and size that a long header's content gives the next member; None where malformed."""
    if kind == _LONG_NAME:
        return content.split(b"\0", 1)[0].decode("utf8", "backslashreplace"), 0
    name, size_above, at = "", 0, 0
    while at < len(content):  # records of the form "30 path=some/long/name.jpg\n"
        space = content.find(b" ", at, at + 9)
        length = content[at:space] if space > 0 else b""
        end = at + int(length) if length.isdigit() else 0
        if not at < space < end <= len(content) or content[end - 1] != _NEWLINE:
            return None
        field, _, value = content[space + 1 : end - 1].partition(b"=")
        if field == b"path":
            name = value.decode("utf8", "backslashreplace")
        elif field == b"size":
            if not value.isdigit() or len(value) > 18:
                return None
            size_above = int(value)
        at = end
    return name, size_above
