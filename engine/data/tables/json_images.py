"""Images that lie in JSON files as base64 text, read from their places when they are asked for."""

from __future__ import annotations

import base64
import binascii
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.data.tables.fields import mapping, strings
from engine.data.tables.json_rows import read_entry
from engine.types import BadSample

KEYS = ("image_base64_str", "image_str", "image_base64")


def decode_base64(text: str) -> bytes:
    """The bytes of a base64 text, or of a ``data:`` address. BadSample for any other text."""
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        return base64.b64decode(text, validate=False)
    except (binascii.Error, ValueError) as error:
        raise BadSample("corrupt", f"not base64: {error}") from error


def image_texts(sample: Any) -> tuple[str, ...]:
    """The base64 texts of a sample's images, none where it has no image; BadSample where they are
    something else."""
    sample = mapping(sample, "the entry")
    texts = next((found for key in KEYS if (found := strings(sample.get(key), key))), ())
    if not all(texts):
        raise BadSample("missing", "the image is an empty text")
    return texts


class JsonImages:
    """An ``ImageStore``: the images of the entry at a place; files are opened at first use."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = list(paths)
        self._opened: dict[int, int] = {}
        self._lock = threading.Lock()

    def __getstate__(self) -> list[Path]:
        return self.paths

    def __setstate__(self, paths: list[Path]) -> None:
        self.__init__(paths)  # type: ignore[misc]

    def __del__(self) -> None:
        for descriptor in self._opened.values():
            os.close(descriptor)

    def read(self, file: int, offset: int, extent: int, count: int) -> tuple[bytes, ...]:
        """The first images' bytes. BadSample where the file has changed or holds no base64."""
        path = self.paths[file]
        try:
            texts = image_texts(read_entry(self._descriptor(file), offset, extent))
        except (ValueError, RecursionError, OSError) as error:
            raise BadSample("unreadable", f"{path} at byte {offset}: {error}") from error
        if len(texts) < count:
            raise BadSample("unreadable", f"{path} at byte {offset}: no image there any more")
        return tuple(map(decode_base64, texts[:count]))

    def _descriptor(self, file: int) -> int:
        with self._lock:
            if file not in self._opened:
                self._opened[file] = os.open(self.paths[file], os.O_RDONLY | os.O_CLOEXEC)
            return self._opened[file]
