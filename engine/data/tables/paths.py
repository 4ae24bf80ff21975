"""Where a split's annotation files and images are, or a message that names what is there."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

from engine.config.schema import Section
from engine.errors import UserError
from engine.types import BadSample

T = TypeVar("T")
_NUM_NAMED = 20  # files in a message
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
        except OSError:  # too long a name, say: reported where it is opened
            is_link = False
        return os.path.realpath(path).startswith(self._root) if is_link else inside


class FolderOptions(Section):
    """Options of a format whose files are in one folder."""

    root: Path  # relative to data.data_path; default: the dataset's name


class SplitFolder:
    """Files of one split of a dataset, by the options that name them.

    Raises UserError, at the option at fault, for what is missing.
    """

    def __init__(self, config: FolderOptions, dataset: str, split: str) -> None:
        self.config, self.dataset, self.split, self.root = config, dataset, split, config.root
        if not self.root.is_dir():
            raise self.error(f"has no folder {self.root}", "root")

    def of(self, train: T, valid: T) -> T:
        """The split's own of two options."""
        return valid if self.split == "valid" else train

    def error(self, what: str, option: str) -> UserError:
        """What is wrong with the dataset, at one of its options."""
        key = f"data.datasets.{self.dataset}.{option}"
        return UserError(f"dataset {self.dataset!r} {what}", key=key)

    def file(self, name: str, option: str, *endings: str) -> Path:
        """The file ``name``, or that with ``.gz`` behind it, which the split's ``option`` names.

        Where there is none, the message lists files of the usual ``endings``.
        """
        path = self.root / name
        found = next((p for p in (path, Path(f"{path}.gz")) if p.is_file()), None)
        if found is None:
            there = f"tables in that folder: {self.listed(endings)}"
            what = f"has no annotation file {path}; {there} (data/README.md shows the form)"
            raise self.error(what, f"{self.split}_{option}")
        return found

    def files(self, patterns: str | Iterable[str], option: str, *endings: str) -> list[Path]:
        """The files that each of the ``patterns`` names, with ``*`` and ``**``, sorted."""
        files: dict[Path, None] = {}
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            if Path(pattern).is_absolute() or ".." in Path(pattern).parts:
                raise self.error(f"must name files inside {self.root}: {pattern!r}", option)
            try:
                found = sorted(path for path in self.root.glob(pattern) if path.is_file())
            except (ValueError, NotImplementedError) as error:
                raise self.error(f"has {pattern!r}, not a pattern: {error}", option) from None
            if not found:
                there = f"tables in that folder: {self.listed(endings)}"
                raise self.error(f"has no files {pattern} in {self.root}; {there}", option)
            files.update(dict.fromkeys(found))
        return list(files)

    def images(self, name: str, option: str | None = None) -> ImageRoot:
        """The image folder ``name``, by the split's option ``images`` or another."""
        path = self.root / name
        if not path.is_dir():
            raise self.error(f"has no image folder {path}", option or f"{self.split}_images")
        return ImageRoot(path)

    def listed(self, endings: Iterable[str]) -> str:
        """Names of files with these endings in the folder and the folders in it."""
        found = sorted(
            {
                str(path.relative_to(self.root))
                for ending in endings
                for pattern in (f"*{ending}", f"*/*{ending}")
                for path in self.root.glob(pattern)
                if not path.relative_to(self.root).parts[0].startswith(".")
            }
        )
        more = ", …" if len(found) > _NUM_NAMED else ""
        return ", ".join(found[:_NUM_NAMED]) + more if found else "none"
