"""A folder that images are read from and never left."""

from __future__ import annotations

import os
import re
from pathlib import Path

from engine.types import BadSample

# A path that could leave its folder: absolute, with a drive, or with a part '..'.
OUTSIDE = r"^[/\\~]|^[A-Za-z]:|(^|[/\\])\.\.([/\\]|$)|\x00"
_OUTSIDE = re.compile(OUTSIDE)
_MAX_FOLDERS = 10_000  # that are remembered


class ImageRoot:
    """Names → files inside one folder; the folder itself may be a link."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._root = os.path.realpath(folder).rstrip(os.sep) + os.sep
        self._real: dict[str, bool] = {}  # folders below, and whether they are where they seem

    def path(self, name: str) -> Path:
        """The file of that name; BadSample for a name or a link that leads out of the folder."""
        if _OUTSIDE.search(name):
            raise BadSample("outside root", f"{name!r} leads out of the image folder")
        path = self.folder / name
        if not self._inside(path, name.rpartition("/")[0]):
            raise BadSample("outside root", f"{path} is a link to {path.resolve()}")
        return path

    def _inside(self, path: Path, parent: str) -> bool:
        """Whether no link leads out; the way to a folder below is followed once."""
        if (inside := self._real.get(parent)) is None:
            real = os.path.realpath(self.folder / parent) + os.sep
            inside = real.startswith(self._root)
            if len(self._real) < _MAX_FOLDERS:
                self._real[parent] = inside
        try:
            is_link = path.is_symlink()
        except OSError:  # too long a name, say: what opens it will tell
            is_link = False
        return os.path.realpath(path).startswith(self._root) if is_link else inside
