"""Checkpoints of a run: saved whole or not at all, pruned with care, never trusted unchecked.

step_N/model.safetensors   the model's parameters and buffers, readable by any other tool
       state.safetensors   tensors of everything else (optimizer, scaler …)
       state.json          the structure that those tensors belong to
       config.yaml         the resolved configuration
       manifest.json       step, metric, and each file's size and SHA-256; its own as well

A save is written by a thread into a hidden folder beside its place, is forced to the disk and only
then renamed, so that a kill at any moment leaves the checkpoints that were there. Only the writer
(rank 0) changes anything; every rank may read.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent import futures
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from engine.errors import FaultError, UserError
from engine.train import serial

MODEL, STATE, SKELETON = "model.safetensors", "state.safetensors", "state.json"
FILES = (MODEL, STATE, SKELETON, "config.yaml")
MANIFEST = "manifest.json"
_FORMAT = 1
_STEP = re.compile(r"step_(0|[1-9]\d*)")
_LEFTOVER = re.compile(r"\.(step_\d+)\.(saving|replaced|removed)-[0-9a-f]{8}")
_PICKLED_SUFFIXES = {".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle", ".distcp"}
_ZIP_OR_PICKLE = re.compile(rb"PK\x03\x04|\x80[\x02-\x05]")
Warn = Callable[[str], None]


class DamageError(Exception):
    """What is wrong with a checkpoint, in words that end a sentence."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint's folder, or a bare safetensors file that holds a model alone (no step)."""

    path: Path
    step: int | None
    metric: float | None = None

    @classmethod
    def read(cls, folder: Path, *, contents: bool = True) -> Checkpoint:
        """The checkpoint in ``folder``, if it is intact; DamageError says what is not.

        ``contents=False`` compares sizes only, and reads none of the large files.
        """
        manifest = _read_manifest(folder)
        if step_of(folder) not in (None, manifest["step"]):
            raise DamageError(f"{MANIFEST} is that of step {manifest['step']}")
        for name in FILES:
            _check_file(folder / name, manifest["files"][name], contents)
        return cls(folder, manifest["step"], manifest["metric"])

    def model(self) -> dict[str, Tensor]:
        """The model's tensors, on the CPU. Raises UserError for a file that cannot be read."""
        path = self.path if self.step is None else self.path / MODEL
        try:
            return serial.read_tensors(path)
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            raise UserError(f"{path} cannot be read as safetensors: {error}") from error

    def need_state(self) -> None:
        """Raises UserError for a file of weights, from which no run can continue."""
        if self.step is None:
            raise UserError(f"{self.path} holds a model's weights only; to continue a run, name "
                            "its folder or one of its checkpoints/step_N")  # fmt: skip

    def state(self) -> Any:
        """The rest of the run's state, as it was given to be saved, with tensors on the CPU."""
        self.need_state()
        skeleton = json.loads((self.path / SKELETON).read_text("utf8"))
        return serial.unflatten(serial.read_tensors(self.path / STATE), skeleton)


def step_of(folder: Path) -> int | None:
    """N of a folder called step_N, None for any other name."""
    match = _STEP.fullmatch(folder.name)
    return int(match[1]) if match else None


def _read_manifest(folder: Path) -> dict[str, Any]:
    with _readable(folder / MANIFEST) as path:
        text = path.read_bytes()
    try:
        content = json.loads(text)
        content.pop("sha256", None)
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise DamageError(f"{MANIFEST} is not intact JSON") from error
    if text != _sealed(content).encode():
        raise DamageError(f"{MANIFEST} has been changed")
    if content.get("format") != _FORMAT:
        raise DamageError(f"its format is {content.get('format')}; this version reads {_FORMAT}")
    return content


def _check_file(path: Path, expected: dict[str, Any], contents: bool) -> None:
    with _readable(path):
        size = path.stat().st_size
        if size != expected["bytes"]:
            raise DamageError(f"{path.name} has {size:,} bytes instead of {expected['bytes']:,}")
        if contents and _size_and_hash(path) != expected:
            raise DamageError(f"{path.name} does not match its checksum: its content has changed")


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[Path]:
    try:
        yield path
    except FileNotFoundError:
        raise DamageError(f"{path.name} is missing") from None
    except OSError as error:
        raise DamageError(f"{path.name} cannot be read: {error.strerror}") from error


def _size_and_hash(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def _sealed(content: dict[str, Any]) -> str:
    """JSON text that ends in the hash of its own content, so that any change to it shows."""
    seal = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return json.dumps({**content, "sha256": seal}, indent=1)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All that a checkpoint will hold."""

    step: int
    metric: float | None
    config_text: str
    model: dict[str, Tensor]
    tied: dict[str, str]
    tensors: dict[str, Tensor]
    skeleton: Any

    def write(self, folder: Path) -> None:
        """Writes all files into an existing folder; when it returns they are on the disk."""
        serial.write_tensors(folder / MODEL, self.model, self.tied)
        serial.write_tensors(folder / STATE, self.tensors, {})
        (folder / SKELETON).write_text(json.dumps(self.skeleton, allow_nan=False), "utf8")
        (folder / "config.yaml").write_text(self.config_text, "utf8")
        files = {name: _size_and_hash(folder / name) for name in FILES}
        content = {"format": _FORMAT, "step": self.step, "metric": self.metric, "files": files}
        (folder / MANIFEST).write_text(_sealed(content), "utf8")
        for path in (*(folder / name for name in (*FILES, MANIFEST)), folder):
            _flush_to_disk(path)


def _flush_to_disk(path: Path) -> None:
    """Forces a file's content, or the names in a folder, out of the system's caches."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class CheckpointStore:
    """The folder of a run's checkpoints, ``step_N`` each.

    Keeps the last ``keep_last`` and the one with the best metric. A store with ``writer=False``
    (ranks other than 0, evaluations) reads only, and its ``save`` does nothing. Creating a writer
    clears away what an interrupted save has left; there must be no more than one of them.
    """

    def __init__(self, folder: Path, keep_last: int = 2, *, writer: bool = True) -> None:
        self.folder, self.keep_last, self.writer = Path(folder), keep_last, writer
        self._thread = futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
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
        parts = (*serial.untie(model, copy=copy), *serial.flatten(state, copy=copy))
        snapshot = Snapshot(step, metric, config_text, *parts)
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

    def __enter__(self) -> CheckpointStore:
        return self

    def __exit__(self, kind: object, error: BaseException | None, *_: object) -> None:
        try:
            self.wait()
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
        _flush_to_disk(self.folder)
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
        keep.add(max(measured, default=(0.0, newest))[1])
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
        _refuse_other_files(path, key)
        return Checkpoint(path, None)
    if (path / MANIFEST).exists() or step_of(path) is not None:
        try:
            return Checkpoint.read(path)
        except DamageError as damage:
            message = f"checkpoint {path} is damaged: {damage}; {_what_is_there(path)}"
            raise UserError(message, key=key) from None
    if (path / ".metadata").exists():
        raise _pickled(path, key)
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


def _refuse_other_files(path: Path, key: str | None) -> None:
    """Raises UserError for a pickled file, by its name or content, and for other formats."""
    with path.open("rb") as file:
        head = file.read(9)
    # A safetensors file starts with its header's length, whose bytes may look like a pickle's
    is_safetensors = head[8:9] == b"{"
    if path.suffix.lower() in _PICKLED_SUFFIXES or (
        not is_safetensors and _ZIP_OR_PICKLE.match(head)
    ):
        raise _pickled(path, key)
    if not is_safetensors:
        raise UserError(f"{path} is not a safetensors file", key=key)


def _pickled(path: Path, key: str | None) -> UserError:
    convert = (
        "import sys, torch, safetensors.torch as s; "
        "w = torch.load(sys.argv[1], map_location='cpu', weights_only=True); "
        "w = w.get('state_dict', w); "
        "s.save_file({k: v.clone() for k, v in w.items()}, sys.argv[2])"
    )
    return UserError(
        f"{path} is a pickled file, which is refused because reading one can run code that is "
        "hidden in it. If it holds a model's weights and you trust where it comes from, convert "
        f'it once: python -c "{convert}" {path.name} {path.stem}.safetensors',
        key=key,
    )
