"""An image's bytes as they are, wherever they are stored, and the ending that they should have."""

from __future__ import annotations

import base64
import binascii
import json
import os
import stat
from functools import lru_cache
from pathlib import Path

from engine.types import BadSample, EncodedImage, Place

# Of photographs, as names of files and members end.
ENDINGS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "ppm", "tif", "tiff", "avif", "jp2")
SUFFIXES = tuple(f".{ending}" for ending in ENDINGS)
MAX_IMAGE_BYTES = 256 << 20
_OPEN_FILES = 64  # of which images are read; each takes one of a process's file descriptors
_MAGIC = (
    (b"\xff\xd8\xff", "jpg"),
    (b"\x89PNG\r\n\x1a\n", "png"),
    (b"GIF87a", "gif"),
    (b"GIF89a", "gif"),
    (b"II*\0", "tif"),
    (b"MM\0*", "tif"),
    (b"P5", "ppm"),
    (b"P6", "ppm"),
    (b"\0\0\0\x0cjP  \r\n\x87\n", "jp2"),
    (b"\xff\x4f\xff\x51", "jp2"),
    (b"BM", "bmp"),
)


def images_in(folder: Path) -> list[str]:
    """Sorted names of the images in a folder, without hidden ones.

    Of bytes that are not UTF-8 a name is made that no file has: a bad sample.
    """
    with os.scandir(folder) as entries:
        names = [e.name for e in entries if e.name[:1] != "." and e.name.lower().endswith(SUFFIXES)]
    return [name.encode(errors="replace").decode() for name in sorted(names)]


def read_bytes(image: EncodedImage) -> bytes:
    """The encoded bytes. Raises BadSample as ``read_image``, and where there are none."""
    data = read_image(image)
    if not data:
        raise BadSample("empty file", "0 bytes")
    return data


def read_image(image: EncodedImage) -> bytes:
    """The encoded bytes. Raises BadSample: missing, unreadable, too large, changed or cut files."""
    if isinstance(image, bytes):
        return image
    return read_file(image) if isinstance(image, Path) else _read_place(image)


def read_file(path: Path) -> bytes:
    """All bytes of a plain file. Raises BadSample."""
    try:
        # Without waiting for the other end, should it be a pipe; that and a device may never end.
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            found = os.fstat(file)
            if not stat.S_ISREG(found.st_mode):
                raise BadSample("unreadable", f"{path} is not a file")
            data = os.read(file, found.st_size)  # in as few system calls as will do
            while len(data) < found.st_size and (more := os.read(file, found.st_size)):
                data += more
            return data
        finally:
            os.close(file)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise BadSample("missing", str(path)) from error
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise BadSample("unreadable", str(error)) from error


def _read_place(place: Place) -> bytes:
    if place.size > MAX_IMAGE_BYTES:
        raise BadSample("too large", f"{place.shown} has {place.size} bytes")
    try:
        file = _opened(place.file, place.state)
        data = os.pread(file.descriptor, place.size, place.offset)
    except FileNotFoundError as error:
        raise BadSample("missing", f"{place.shown}: {place.file} is gone") from error
    except OSError as error:
        raise BadSample("unreadable", f"{place.shown}: {error}") from error
    if len(data) < place.size:
        left = f"{len(data)} of {place.size} bytes are left"
        raise BadSample("changed file", f"{place.shown}: {left}")
    return decode_base64(data) if place.base64 else data


class _File:
    """An open file; closed when the last user lets go of it."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __del__(self) -> None:
        os.close(self.descriptor)


@lru_cache(_OPEN_FILES)
def _opened(path: str, state: tuple[int, int] | None) -> _File:
    file = _File(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
    found = os.fstat(file.descriptor)
    if state not in (None, (found.st_size, found.st_mtime_ns)):
        raise BadSample("changed file", f"{path} is not what was indexed; start again")
    return file


def decode_base64(text: bytes) -> bytes:
    """The bytes of a base64 text or ``data:`` address, also as JSON spells it. Raises BadSample."""
    try:
        if b"\\" in text:
            text = json.loads(b'"' + text + b'"').encode(errors="replace")
        if text.startswith(b"data:"):
            text = text.partition(b",")[2]
        return base64.b64decode(text, validate=False)
    except (binascii.Error, ValueError) as error:
        raise BadSample("corrupt", f"not base64: {error}") from error


def ending_of(data: bytes) -> str:
    """``jpg``, ``png``, … by the bytes that such a file begins with. Raises BadSample."""
    for magic, ending in _MAGIC:
        if data.startswith(magic):
            return ending
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    if data[4:12] in (b"ftypavif", b"ftypavis"):
        return "avif"
    raise BadSample("not an image", f"it begins with {data[:12]!r}")
