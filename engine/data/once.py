"""Files and folders that are made once, however many processes ask for them at the same time."""

from __future__ import annotations

import fcntl
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def make_once(target: Path, make: Callable[[Path], None]) -> Path:
    """``target``, made by ``make(temporary_path)`` unless it is there; returns ``target``.

    One process makes it while others wait at a lock file beside it; it gets its name only when it
    is whole, so that an interruption leaves nothing that could be taken for it. Left-overs of
    interrupted makers are removed. Raises OSError where the folder cannot be written.
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
            make(temporary)
            _publish(temporary, target)
        finally:
            _remove(temporary)
    return target


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Hold the lock; False where the file system knows no locks.

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
        if not target.is_dir():  # else another machine's maker was first, with the same content
            raise


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
