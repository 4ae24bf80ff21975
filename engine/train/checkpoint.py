"""Checkpoints of a run: saved whole or not at all, pruned with care, never trusted unchecked.

A save goes into a hidden folder beside its place, is forced to the disk and only then renamed, so
that a kill at any moment leaves the checkpoints that were there. Only the writer (rank 0) changes
anything; every rank may read.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import re
import secrets
import shutil
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from engine.errors import FaultError, UserError
from engine.models.weights import load_model
from engine.train.checkpoint_folder import (
    MANIFEST,
    Checkpoint,
    DamageError,
    Snapshot,
    flush_to_disk,
    step_of,
)
from engine.train.weights import refusal, refuse_pickle, what_is_there

__all__ = ["Checkpoint", "CheckpointStore", "load_model", "open_checkpoint"]

_LEFTOVER = re.compile(r"\.(step_\d+)\.(saving|replaced|removed)-[0-9a-f]{8}")
Warn = Callable[[str], None]


class CheckpointStore:
    """The folder of a run's checkpoints, ``step_N`` each.

    Keeps the last ``keep_last`` and the one with the best metric. A store with ``writer=False``
    (ranks other than 0, evaluations) reads only, and its ``save`` does nothing. Creating a writer
    clears away what an interrupted save has left; there must be no more than one of them.
    """

    def __init__(self, folder: Path, keep_last: int = 2, *, writer: bool = True) -> None:
        self.folder = Path(folder)
        self.keep_last = keep_last
        self.writer = writer
        self._thread: ThreadPoolExecutor | None = None
        self._pending: Future[Path] | None = None
        if writer:
            self._prepare()

    def _prepare(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not os.access(self.folder, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            for path in sorted(self.folder.iterdir()):
                match = _LEFTOVER.fullmatch(path.name)
                if match is None or path.is_symlink() or not path.is_dir():
                    continue
                # Killed between the two renames of a replacement: the old one is still the one
                if match[2] == "replaced" and not (self.folder / match[1]).exists():
                    path.rename(self.folder / match[1])
                else:
                    shutil.rmtree(path)
        except OSError as error:
            message = f"no checkpoints can be written to {self.folder}: {error.strerror}"
            raise UserError(message, key="ckpt.dir") from error

    def save(
        self,
        step: int,
        *,
        model: Mapping[str, Tensor],
        state: Any,
        config_text: str,
        metric: float | None = None,
        best_greater: bool = True,
        background: bool = False,
    ) -> Path | None:
        """Saves a checkpoint, whole on the disk on return; its folder, or None of a non-writer.

        With ``background`` the tensors are copied and the writing goes on in a thread. The next
        call waits for it and raises what went wrong with it. Raises FaultError where the file
        system refuses; the checkpoints that were there stay.
        """
        if not self.writer:
            return None
        self.wait()
        metric = metric if metric is not None and math.isfinite(metric) else None
        snapshot = Snapshot.take(step, model, state, config_text, metric, copy=background)
        if not background:
            return self._write(snapshot, best_greater)
        self._thread = self._thread or ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending = self._thread.submit(self._write, snapshot, best_greater)
        return self.folder / f"step_{step}"

    def wait(self) -> None:
        """Waits for a save in the background; raises FaultError if it failed."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Waits as ``wait`` does, and ends the thread."""
        try:
            self.wait()
        finally:
            if self._thread is not None:
                self._thread.shutdown()
                self._thread = None

    def __enter__(self) -> CheckpointStore:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            self.close()
        except FaultError as fault:
            if error is None:
                raise
            error.add_note(str(fault))  # what broke off the run is the greater news

    def _write(self, snapshot: Snapshot, best_greater: bool) -> Path:
        final = self.folder / f"step_{snapshot.step}"
        temporary = self._hidden(final, "saving")
        try:
            temporary.mkdir(parents=True)
            snapshot.write(temporary)
            self._put(temporary, final)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise FaultError(self._failure(final, error)) from error
        self._prune(snapshot.step, best_greater)
        return final

    def _hidden(self, final: Path, role: str) -> Path:
        return self.folder / f".{final.name}.{role}-{secrets.token_hex(4)}"

    def _put(self, temporary: Path, final: Path) -> None:
        """Renames a finished save to its place; what was there leaves only afterwards."""
        aside = self._hidden(final, "replaced")
        replaces = final.exists()
        if replaces:
            final.rename(aside)
        try:
            temporary.rename(final)
        except OSError:
            if replaces:
                aside.rename(final)
            raise
        flush_to_disk(self.folder)
        if replaces:
            self._remove(aside, final)

    def _remove(self, path: Path, final: Path) -> None:
        # Renamed first: half a deletion must not look like a checkpoint
        with contextlib.suppress(OSError):
            shutil.rmtree(path.rename(self._hidden(final, "removed")), ignore_errors=True)

    def _failure(self, final: Path, error: Exception) -> str:
        cause = getattr(error, "strerror", None) or str(error)
        with contextlib.suppress(OSError):
            cause += f" ({shutil.disk_usage(self.folder).free / 2**20:,.0f} MiB free)"
            left = ", ".join(f"step_{step}" for step in self.steps()) or "none"
            cause += f". Checkpoints still there: {left}"
        return f"checkpoint {final} could not be saved: {cause}"

    def _prune(self, newest: int, best_greater: bool) -> None:
        """Removes older checkpoints than the one just written, but for the last k and the best."""
        metrics: dict[int, float | None] = {}
        paths = {step: self.folder / f"step_{step}" for step in self.steps()}
        for step, path in paths.items():
            with contextlib.suppress(DamageError):
                metrics[step] = Checkpoint.read(path, contents=False).metric
        keep = {newest, *[step for step in metrics if step <= newest][-self.keep_last :]}
        sign = 1 if best_greater else -1
        measured = [(sign * value, step) for step, value in metrics.items() if value is not None]
        if measured:
            keep.add(max(measured)[1])
        for step, path in paths.items():
            if step < newest and step not in keep:
                self._remove(path, path)

    def steps(self) -> list[int]:
        """Steps of all checkpoints that are there, intact or not, in order."""
        if not self.folder.is_dir():
            return []
        found = ((step_of(path), path) for path in self.folder.iterdir())
        return sorted(step for step, path in found if step is not None and path.is_dir())

    def latest(self, warn: Warn = warnings.warn) -> Checkpoint | None:
        """The newest intact checkpoint, or None where there is none at all.

        ``warn`` gets a line for each damaged one that is passed over. Raises UserError if all are
        damaged, since to start over would be the wrong thing to do silently.
        """
        self.wait()
        damages = []
        for step in reversed(self.steps()):
            path = self.folder / f"step_{step}"
            try:
                return Checkpoint.read(path)
            except DamageError as damage:
                damages.append(f"{path.name}: {damage}")
                warn(f"checkpoint {path} is damaged and passed over: {damage}")
        if not damages:
            return None
        raise UserError(
            f"all checkpoints in {self.folder} are damaged ({'; '.join(damages)}). Name an intact "
            "one by ckpt.resume, or move these away to start from the beginning",
            key="ckpt.auto_resume",
        )


def open_checkpoint(
    path: str | Path, *, key: str | None = None, warn: Warn = warnings.warn
) -> Checkpoint:
    """The checkpoint that ``path`` means: a run (its latest), one ``step_N``, or a weights file.

    Raises UserError, at the configuration's ``key``, for a path that is not there, a damaged
    checkpoint, and pickled files, which are never opened.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise UserError(f"{path} does not exist; {what_is_there(path)}", key=key)
    if path.is_file():
        refuse_pickle(path, key)
        return Checkpoint(path, None)
    if (path / MANIFEST).exists() or step_of(path) is not None:
        try:
            return Checkpoint.read(path)
        except DamageError as damage:
            message = f"checkpoint {path} is damaged: {damage}; {what_is_there(path)}"
            raise UserError(message, key=key) from None
    if (path / ".metadata").exists():
        raise UserError(refusal(path), key=key)
    for folder in (path / "checkpoints", path):
        found = CheckpointStore(folder, writer=False).latest(warn)
        if found is not None:
            return found
    raise UserError(f"{path} holds no checkpoint; {what_is_there(path / '_')}", key=key)
