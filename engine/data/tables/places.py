"""Where a split's annotation file and images lie, or a message that names what is there instead."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from engine.data.tables.image_root import ImageRoot
from engine.errors import UserError

_NUM_NAMED = 20  # files in a message


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
            raise UserError(f"{pattern!r} is no pattern of files: {error}", key=key) from None
        if not found:
            raise UserError(
                f"dataset {dataset!r} has no files {pattern} in {root}; tables in that folder: "
                f"{listed(root, endings)}",
                key=key,
            )
        files.update(dict.fromkeys(found))
    return list(files)


def image_folder(root: Path, folder: str, *, dataset: str, option: str) -> ImageRoot:
    """The folder of a split's images. Raises UserError at the dataset's ``option`` for none."""
    check_root(root, dataset=dataset)
    if not (root / folder).is_dir():
        raise UserError(
            f"dataset {dataset!r} has no image folder {root / folder}",
            key=f"data.datasets.{dataset}.{option}",
        )
    return ImageRoot(root / folder)


def check_root(root: Path, *, dataset: str) -> None:
    """Raises UserError where a dataset's folder is none."""
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
