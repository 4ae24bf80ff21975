"""Where a split's annotation files and images are, or a message that names what is there."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from engine.errors import UserError
from engine.types import BadSample

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


def annotation_file(
    root: Path, name: str, *, dataset: str, option: str, endings: Iterable[str]
) -> Path:
    """The file ``name`` in ``root``, or that with ``.gz`` behind it.

    Raises UserError at the dataset's ``option`` where there is none, naming the files of the usual
    ``endings`` in ``root``.
    """
    check_root(root, dataset=dataset)
    for path in (root / name, root / f"{name}.gz"):
        if path.is_file():
            return path
    raise UserError(
        f"dataset {dataset!r} has no annotation file {root / name}; tables in that folder: "
        f"{listed(root, endings)} (data/README.md shows the form)",
        key=f"data.datasets.{dataset}.{option}",
    )


def annotation_files(
    root: Path,
    patterns: str | Iterable[str],
    *,
    dataset: str,
    option: str,
    endings: Iterable[str],
) -> list[Path]:
    """The files in ``root`` that each of ``patterns`` names, with ``*`` and ``**``, sorted.

    Raises UserError at the dataset's ``option`` for a pattern that names none.
    """
    check_root(root, dataset=dataset)
    key = f"data.datasets.{dataset}.{option}"
    files: dict[Path, None] = {}
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if Path(pattern).is_absolute() or ".." in Path(pattern).parts:
            raise UserError(f"{pattern!r} must name files inside {root}, without '..'", key=key)
        try:
            found = sorted(path for path in root.glob(pattern) if path.is_file())
        except (ValueError, NotImplementedError) as error:
            raise UserError(f"{pattern!r} is not a pattern of files: {error}", key=key) from None
        if not found:
            raise UserError(
                f"dataset {dataset!r} has no files {pattern} in {root}; tables in that folder: "
                f"{listed(root, endings)}",
                key=key,
            )
        files.update(dict.fromkeys(found))
    return list(files)


def image_folder(root: Path, folder: str, *, dataset: str, option: str) -> ImageRoot:
    """The folder of a split's images. Raises UserError, at ``option``, where it is missing."""
    check_root(root, dataset=dataset)
    if not (root / folder).is_dir():
        raise UserError(
            f"dataset {dataset!r} has no image folder {root / folder}",
            key=f"data.datasets.{dataset}.{option}",
        )
    return ImageRoot(root / folder)


def check_root(root: Path, *, dataset: str) -> None:
    """Raises UserError where a dataset's folder does not exist."""
    if not root.is_dir():
        raise UserError(
            f"dataset {dataset!r} has no folder {root}", key=f"data.datasets.{dataset}.root"
        )


def listed(root: Path, endings: Iterable[str]) -> str:
    """Names of files with these endings in ``root`` and the folders in it."""
    found = sorted(
        {
            str(path.relative_to(root))
            for ending in endings
            for pattern in (f"*{ending}", f"*/*{ending}")
            for path in root.glob(pattern)
            if not path.relative_to(root).parts[0].startswith(".")
        }
    )
    more = ", …" if len(found) > _NUM_NAMED else ""
    return ", ".join(found[:_NUM_NAMED]) + more if found else "none"
