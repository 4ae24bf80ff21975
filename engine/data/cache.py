"""What is made once of data on disk, and kept: built by one process while others wait for it.

What is made of a file is in ``.engine_cache`` beside it, or in a folder of the user's where that
cannot be written. Its name holds the sizes and times of what it was made of, so that it cannot be
stale: changed files get a new one, and that of their former state is removed.
"""

from __future__ import annotations

import fcntl
import glob
import hashlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from engine.errors import UserError

NAME_LENGTH = 100  # of an input's name in the name of what is made of it


def cached_file(
    inputs: Sequence[Path],
    options: object,
    write: Callable[[Path], None],
    *,
    cache_dir: Path,
    ending: str,
) -> Path:
    """The file that ``write(temporary_path)`` makes of ``inputs``, built once for their state.

    ``options`` is all else that it depends on, told apart by its ``repr``. Raises UserError for an
    input that cannot be read and a cache that cannot be written.
    """
    first = inputs[0]
    state = _state(inputs)
    folder = cache_folder(first, cache_dir)
    named = digest(options, [str(path.absolute()) for path in inputs[1:]])
    stem = f"{first.name[:NAME_LENGTH]}.{named}"
    target = folder / f"{stem}.{state}.{ending}"
    if not target.exists():
        try:
            build_cached(target, write)
        except OSError as error:
            raise UserError(f"cannot write the table of {first} in {folder}: {error}") from error
        for old in folder.glob(f"{glob.escape(stem)}.*"):
            if not old.name.startswith(target.name):
                old.unlink(missing_ok=True)  # processes that mapped it keep its pages
    return target


def cache_folder(path: Path, cache_dir: Path) -> Path:
    """Where what is made of the file ``path`` is kept."""
    beside = path.parent / ".engine_cache"
    if os.access(beside if beside.exists() else path.parent, os.W_OK):
        return beside
    return cache_dir / digest(str(path.parent.resolve()))


def cached_array(
    path: Path, kind: type, length: int, chunks: Callable[[], Iterable[np.ndarray]]
) -> np.ndarray:
    """The array that ``chunks()`` makes up, memory-mapped from ``path``, which is built once."""

    def fill(array: np.ndarray) -> None:
        start = 0
        for chunk in chunks():
            array[start : start + len(chunk)] = chunk
            start += len(chunk)

    def write(temporary: Path) -> None:
        array = np.lib.format.open_memmap(temporary, "w+", kind, (length,))
        fill(array)
        array.flush()

    try:
        build_cached(path, write)
    except OSError:  # a cache that another user made and this one may only read
        array: np.ndarray = np.empty(length, kind)
        fill(array)
        return array
    return np.load(path, mmap_mode="r")


def build_cached(target: Path, build: Callable[[Path], None]) -> Path:
    """``target``, built by ``build(temporary_path)`` unless it exists; returns ``target``.

    One process builds it while others wait at a lock file beside it; it gets its name only when it
    is whole, so that an interruption leaves nothing that could be taken for it. Left-overs of
    interrupted builds are removed. Raises OSError where the folder cannot be written.
    """
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with _locked(target.with_name(f".{target.name}.lock")) as alone:
        if target.exists():
            return target
        if alone:
            for left_over in target.parent.glob(f".{target.name}.making-*"):
                _remove(left_over)
        temporary = target.with_name(f".{target.name}.making-{uuid.uuid4().hex}")
        try:
            build(temporary)
            _publish(temporary, target)
        finally:
            _remove(temporary)
    return target


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Hold the lock; False where the file system has no locks.

    Without one, several processes may do the same work, and the first to finish wins. The lock
    file stays: removing it would let two processes hold locks on different files of that name.
    """
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            yield False
        else:
            yield True


def _publish(temporary: Path, target: Path) -> None:
    if temporary.is_file():
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(target)
        return
    try:
        temporary.rename(target)
    except OSError:
        if not target.is_dir():  # else another machine's process was first, with the same content
            raise


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _state(inputs: Sequence[Path]) -> str:
    """Sizes and times of the inputs: spelled out for one, hashed for several."""
    stats = []
    for path in inputs:
        try:
            stat = path.stat()
        except OSError as error:
            raise UserError(f"cannot read annotation file {path}: {error.strerror}") from None
        stats.append(f"{stat.st_size}-{stat.st_mtime_ns}")
    return stats[0] if len(stats) == 1 else digest(stats)


def digest(*values: object) -> str:
    """A short name of values, by their ``repr``."""
    return hashlib.blake2b(repr(values).encode(), digest_size=8).hexdigest()
