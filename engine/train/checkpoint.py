"""Checkpoints of a run: saved whole or not at all, pruned with care, never trusted unchecked.

A save is written by a thread into a hidden folder beside its place, is forced to the disk and only
then renamed, so that a kill at any moment leaves the checkpoints that were there. Only the writer
(rank 0) changes anything; every rank may read.
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
from concurrent import futures
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from engine.errors import FaultError, UserError
from engine.train.checkpoint_folder import (
    MANIFEST,
    Checkpoint,
    DamageError,
    Snapshot,
    flush_to_disk,
    step_of,
)

_LEFTOVER = re.compile(r"\.(step_\d+)\.(saving|replaced|removed)-[0-9a-f]{8}")
_PICKLED_SUFFIXES = {".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle", ".distcp"}
_ZIP, _PICKLE = b"PK\x03\x04", re.compile(rb"\x80[\x02-\x05]")
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
        self._pending: futures.Future[None] | None = None
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
        copy: bool = True,
    ) -> None:
        """Takes the state as it is now; a thread writes it while training goes on.

        ``copy``: the tensors, unless nothing else will change them. One save is in flight at a
        time: the next call waits for it, and raises FaultError if the file system refused it; the
        checkpoints that were there stay.
        """
        if not self.writer:
            return
        self.wait()
        metric = metric if metric is not None and math.isfinite(metric) else None
        snapshot = Snapshot.take(step, model, state, config_text, metric, copy=copy)
        self._thread = self._thread or ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending = self._thread.submit(self._write, snapshot)

    def wait(self) -> None:
        """Waits for the save in flight; raises FaultError if it failed."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def settle(self) -> None:
        """Waits for the save in flight, and leaves its failure to be raised by the next call."""
        if self._pending is not None:
            futures.wait([self._pending])

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

    def __exit__(self, kind: object, error: BaseException | None, *_: object) -> None:
        try:
            self.close()
        except FaultError as fault:
            if error is None:
                raise
            error.add_note(str(fault))  # what ended the run comes first

    def _write(self, snapshot: Snapshot) -> None:
        final = self.folder / f"step_{snapshot.step}"
        temporary = self._hidden(final, "saving")
        try:
            temporary.mkdir(parents=True)
            snapshot.write(temporary)
            self._put(temporary, final)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise FaultError(self._failure(final, error)) from error
        self._prune(snapshot.step)

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

    def _prune(self, newest: int) -> None:
        """Removes older checkpoints than the one just written, but for the last k and the best."""
        metrics: dict[int, float | None] = {}
        paths = {step: self.folder / f"step_{step}" for step in self.steps()}
        for step, path in paths.items():
            with contextlib.suppress(DamageError):
                metrics[step] = Checkpoint.read(path, contents=False).metric
        keep = {newest, *[step for step in metrics if step <= newest][-self.keep_last :]}
        measured = [(value, step) for step, value in metrics.items() if value is not None]
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
        raise UserError(f"{path} does not exist; {_what_is_there(path)}", key=key)
    if path.is_file():
        _refuse_pickle(path, key)
        return Checkpoint(path, None)
    if (path / MANIFEST).exists() or step_of(path) is not None:
        try:
            return Checkpoint.read(path)
        except DamageError as damage:
            message = f"checkpoint {path} is damaged: {damage}; {_what_is_there(path)}"
            raise UserError(message, key=key) from None
    if (path / ".metadata").exists():
        raise UserError(_refusal(path), key=key)
    for folder in (path / "checkpoints", path):
        found = CheckpointStore(folder, writer=False).latest(warn)
        if found is not None:
            return found
    raise UserError(f"{path} holds no checkpoint; {_what_is_there(path / '_')}", key=key)


def _what_is_there(path: Path) -> str:
    """What the nearest folder above holds, for a message."""
    folder = next(parent for parent in path.absolute().parents if parent.is_dir())
    names = sorted(entry.name for entry in folder.iterdir())
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return f"in {folder} there is: {', '.join(names[:10]) or 'nothing'}{more}"


def _refuse_pickle(path: Path, key: str | None) -> None:
    """Raises UserError for a pickled file, by its name or content, and for none of safetensors."""
    with path.open("rb") as file:
        head = file.read(9)
    # A safetensors file starts with its header's length, whose bytes may look like a pickle's
    is_safetensors = head[8:9] == b"{"
    magic = head.startswith(_ZIP) or _PICKLE.match(head) is not None
    if path.suffix.lower() in _PICKLED_SUFFIXES or (magic and not is_safetensors):
        raise UserError(_refusal(path), key=key)
    if not is_safetensors:
        raise UserError(f"{path} is not a safetensors file", key=key)


def _refusal(path: Path) -> str:
    """Why a pickled file is not opened, and how to convert it."""
    convert = (
        "import sys, torch, safetensors.torch as s; "
        "w = torch.load(sys.argv[1], map_location='cpu', weights_only=True); "
        "w = w.get('state_dict', w); "
        "s.save_file({k: v.clone() for k, v in w.items()}, sys.argv[2])"
    )
    return (
        f"{path} is a pickled file, which is refused because reading one can run code that is "
        "hidden in it. If it holds a model's weights and you trust where it comes from, convert "
        f'it once: python -c "{convert}" {path.name} {path.stem}.safetensors'
    )
