"""An image's bytes as they are, and the ending that they should have."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from engine.types import BadSample

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


def read_bytes(image: Path | bytes) -> bytes:
    """The encoded bytes. Raises BadSample: missing, unreadable, empty file."""
    data = image if isinstance(image, bytes) else _read(image)
    if not data:
        raise BadSample("empty file", "0 bytes")
    return data


def _read(path: Path) -> bytes:
    try:
        # Not to wait for the other end where it is a pipe.
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise BadSample("unreadable", f"{path} is not a file")
            return file.read()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise BadSample("missing", str(path)) from error
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise BadSample("unreadable", str(error)) from error


def ending_of(data: bytes) -> str:
    """``jpg``, ``png``, … by the bytes that a file of that kind begins with.

    Raises BadSample, not an image, for bytes that begin as none does.
    """
    for magic, ending in _MAGIC:
        if data.startswith(magic):
            return ending
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    if data[4:12] in (b"ftypavif", b"ftypavis"):
        return "avif"
    raise BadSample("not an image", f"it begins with {data[:12]!r}")
