"""Which rows of a dataset show the same image: found once, kept on disk, and memory-mapped."""

from __future__ import annotations

import glob
import hashlib
from pathlib import Path

import numpy as np

from engine.data.cache import build_cached
from engine.data.permutation import Indices
from engine.errors import UserError
from engine.types import Source

_FORM = 1  # of the cached file; raised when its content changes


class Groups:
    """The rows of each image, images in the order of their first rows; pickled as a path.

    The file is one int64 array: the number n of images, the n + 1 bounds of their rows, and the
    rows, image after image. It is memory-mapped.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._open()

    def _open(self) -> None:
        stored = np.load(self.path, mmap_mode="r")
        self._bounds, self.rows = np.split(stored[1:], [int(stored[0]) + 1])

    def __getstate__(self) -> Path:
        return self.path

    def __setstate__(self, path: Path) -> None:
        self.path = path
        self._open()

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def __getitem__(self, image: int) -> Indices:
        """The rows of an image in order; raises IndexError outside ``range(len(self))``."""
        if not 0 <= image < len(self):
            raise IndexError(f"image {image} of {len(self)}")
        return self.rows[self._bounds[image] : self._bounds[image + 1]]

    def firsts(self) -> Indices:
        """int64 [images]: the first row of each image."""
        return self.rows[self._bounds[:-1]]

    def sizes(self, first: int, end: int) -> Indices:
        """int64: how many rows the images from ``first`` up to ``end`` have."""
        return np.diff(self._bounds[first : end + 1])


def group_rows(source: Source, folder: Path) -> Groups:
    """The rows of ``source`` by ``image_id``, read from ``folder`` or written there.

    A row without an image_id is an image of its own. The file is named by what was grouped, so that
    it cannot be stale; that of a former state is removed. Raises UserError for a folder that cannot
    be written.
    """
    codes = np.ascontiguousarray(source.column("image_id"), np.int64)
    digest = hashlib.blake2b(codes.data, digest_size=12, salt=bytes([_FORM]))
    stem = f"{source.name[:100]}.{source.split}.groups"
    target = folder / f"{stem}.{digest.hexdigest()}.npy"
    if not target.exists():
        try:
            build_cached(target, lambda temporary: _write(codes, temporary))
        except OSError as error:
            raise UserError(
                f"cannot write in {folder} which rows of dataset {source.name!r} are of one image: "
                f"{error}"
            ) from error
        for old in folder.glob(f"{glob.escape(stem)}.*.npy"):
            if old != target:
                old.unlink(missing_ok=True)  # processes that mapped it keep its pages
    return Groups(target)


def _write(codes: Indices, path: Path) -> None:
    codes = codes.copy()
    without = np.flatnonzero(codes < 0)
    codes[without] = np.arange(len(without)) + codes.max(initial=-1) + 1
    order = np.argsort(codes, kind="stable")
    starts = _starts(codes[order])
    # Images come in the order of their first rows, whatever their codes: neighbours stay so.
    first_of_row = np.empty_like(order)
    first_of_row[order] = np.repeat(order[starts], np.diff(starts, append=len(order)))
    order = np.argsort(first_of_row, kind="stable")
    starts = _starts(first_of_row[order])
    with path.open("wb") as file:
        np.save(file, np.concatenate(([len(starts)], starts, [len(order)], order)))


def _starts(values: Indices) -> Indices:
    """Where each run of equal values begins."""
    return np.flatnonzero(np.diff(values, prepend=values[:1] - 1))
