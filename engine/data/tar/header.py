"""One header of a tar file, in any of the forms that writers have given it."""

from __future__ import annotations

import re
from zlib import adler32

BLOCK = 512
LONG_NAME = ord("L")
NEWLINE = ord("\n")
SUMS: dict[bytes, int] = {}  # what Adler-32's low half is where a header says this sum
_MAX_SUMS = 1 << 16
_OCTAL = re.compile(rb"[0-7]+")
_ADLER = 65_521


def size_in(header: bytes) -> int:
    """The size in a header; -1 where it is no header.

    The low half of Adler-32 is one more than the sum of all bytes (modulo 65,521), and ten times as
    fast as adding them up. A header's own sum counts as eight spaces.
    """
    if len(header) < BLOCK:
        return -1
    own = header[148:156]
    if own not in SUMS:
        if len(SUMS) >= _MAX_SUMS:
            SUMS.clear()
        digits = own.split(b"\0", 1)[0].strip()
        valid = _OCTAL.fullmatch(digits)
        SUMS[own] = (int(digits, 8) - 255 + sum(own)) % _ADLER if valid else -1
    if adler32(header) & 0xFFFF != SUMS[own] and not _signed_sum_is(header, SUMS[own]):
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


def name_in(header: bytes) -> str:
    """The member's name; bytes that are no UTF-8 are spelled out."""
    end = header.find(0, 0, 100)
    name = header[: end if end >= 0 else 100]
    # GNU's own form (magic "ustar  ") keeps times where ustar keeps a folder.
    if header[345] and header[257:263] == b"ustar\0":
        name = header[345:500].split(b"\0", 1)[0] + b"/" + name
    return name.decode("utf8", "backslashreplace")


def long_header(content: bytes, kind: int) -> tuple[str, int] | None:
    """Name and size that a long header's content gives the next member; None where malformed."""
    if kind == LONG_NAME:
        return content.split(b"\0", 1)[0].decode("utf8", "backslashreplace"), 0
    name, size_above, at = "", 0, 0
    while at < len(content):  # records of the form "30 path=some/long/name.jpg\n"
        space = content.find(b" ", at, at + 9)
        length = content[at:space] if space > 0 else b""
        end = at + int(length) if length.isdigit() else 0
        if not at < space < end <= len(content) or content[end - 1] != NEWLINE:
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
