"""The images that ``--mode=generate`` is given, as a source of rows without texts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from engine.data.image_files import SUFFIXES
from engine.errors import UserError
from engine.types import Row, Source


class Folder(Source):
    """The images below a folder, by their sorted relative paths; no captions.

    Hidden files and folders are left out. ``closed`` are folders that may not be read.
    """

    split = "input"

    def __init__(self, root: Path) -> None:
        self.root, self.name = root, root.name
        self.paths: list[str] = []
        self.closed: list[str] = []
        for folder, inner, files in os.walk(root, onerror=self._note):
            inner[:] = [name for name in inner if not name.startswith(".")]
            self.paths += [
                str((Path(folder) / name).relative_to(root))
                for name in files
                if name.lower().endswith(SUFFIXES) and not name.startswith(".")
            ]
        self.paths.sort()

    def _note(self, error: OSError) -> None:
        self.closed.append(f"{error.filename}: {error.strerror}")

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Row:
        path = self.paths[index]
        return Row(path, (self.root / path,), "", path, str(index))

    def column(self, name: str) -> np.ndarray:
        """int64 [rows]: every image is its own."""
        return np.arange(len(self))

    def captions(self) -> Iterator[str]:
        """One empty text an image."""
        return iter([""] * len(self))


def open_folder(name: str | None) -> Folder:
    """The folder that ``generate.input`` names. Raises UserError."""
    if name is None:
        raise UserError("--mode=generate needs a folder of images: input=DIR", key="generate.input")
    root = Path(name)
    if not root.is_dir():
        what = f"{root} is a file" if root.exists() else f"there is no folder {root}"
        raise UserError(f"{what}; input=DIR names a folder of images", key="generate.input")
    source = Folder(root)
    if not len(source):
        raise UserError(
            f"{root} holds no images; known endings: {' '.join(SUFFIXES)}"
            + "".join(f"; {closed}" for closed in source.closed[:1]),
            key="generate.input",
        )
    return source
