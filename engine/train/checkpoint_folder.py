"""What one checkpoint's folder holds, how it is written, and how damage to it is found.

step_N/model.safetensors   the model's parameters and buffers, readable by any other tool
       state.safetensors   tensors of everything else (optimizer, scaler …)
       state.json          the structure that those tensors belong to
       config.yaml         the resolved configuration
       manifest.json       step, metric, and each file's size and SHA-256; its own as well
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from engine.errors import UserError
from engine.train import serial

MODEL, STATE, SKELETON, CONFIG = (
    "model.safetensors",
    "state.safetensors",
    "state.json",
    "config.yaml",
)
MANIFEST = "manifest.json"
FILES = (MODEL, STATE, SKELETON, CONFIG)
_FORMAT = 1
_STEP = re.compile(r"step_(0|[1-9]\d*)")


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All that a checkpoint will hold, as it is written."""

    step: int
    model: dict[str, Tensor]
    tied: dict[str, str]
    tensors: dict[str, Tensor]
    skeleton: Any
    config_text: str
    metric: float | None

    @classmethod
    def take(
        cls,
        step: int,
        model: Mapping[str, Tensor],
        state: Any,
        config_text: str,
        metric: float | None,
        *,
        copy: bool,
    ) -> Snapshot:
        """``copy``: onto the CPU, so that training may change the originals."""
        unique, tied = serial.untie(model)
        tensors, skeleton = serial.flatten(state)
        if copy:
            unique = {name: tensor.to("cpu", copy=True) for name, tensor in unique.items()}
            tensors = {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}
        return cls(step, unique, tied, tensors, skeleton, config_text, metric)

    def write(self, folder: Path) -> None:
        """Writes all files into an existing folder; when it returns they are on the disk."""
        serial.write_tensors(folder / MODEL, self.model, self.tied)
        serial.write_tensors(folder / STATE, self.tensors, {})
        (folder / SKELETON).write_text(json.dumps(self.skeleton, allow_nan=False), "utf8")
        (folder / CONFIG).write_text(self.config_text, "utf8")
        files = {name: _size_and_hash(folder / name) for name in FILES}
        content = {"format": _FORMAT, "step": self.step, "metric": self.metric, "files": files}
        (folder / MANIFEST).write_text(_sealed(content), "utf8")
        for path in (*(folder / name for name in (*FILES, MANIFEST)), folder):
            flush_to_disk(path)


def flush_to_disk(path: Path) -> None:
    """Forces a file's content, or the names in a folder, out of the system's caches."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _size_and_hash(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def _sealed(content: dict[str, Any]) -> str:
    """JSON text that ends in the hash of its own content, so that any change to it shows."""
    seal = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return json.dumps({**content, "sha256": seal}, indent=1)


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
        named = step_of(folder)
        if named is not None and named != manifest["step"]:
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

    def state(self) -> Any:
        """The rest of the run's state, as it was given to be saved, with tensors on the CPU."""
        if self.step is None:
            raise UserError(
                f"{self.path} holds a model's weights only; to continue a run, name its folder "
                "or one of its checkpoints/step_N"
            )
        skeleton = json.loads((self.path / SKELETON).read_text("utf8"))
        return serial.unflatten(serial.read_tensors(self.path / STATE), skeleton)

    def config_text(self) -> str | None:
        """The configuration that it was made with, None where it is not known."""
        return None if self.step is None else (self.path / CONFIG).read_text("utf8")


def step_of(folder: Path) -> int | None:
    """N of a folder called step_N, None for any other name."""
    match = _STEP.fullmatch(folder.name)
    return int(match[1]) if match else None


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        text = path.read_text("utf8")
        manifest = json.loads(text)
        content = {key: value for key, value in manifest.items() if key != "sha256"}
    except FileNotFoundError:
        raise DamageError(f"{MANIFEST} is missing") from None
    except OSError as error:
        raise DamageError(f"{MANIFEST} cannot be read: {error.strerror}") from error
    except (ValueError, AttributeError, RecursionError) as error:
        raise DamageError(f"{MANIFEST} is not intact JSON") from error
    if text != _sealed(content):
        raise DamageError(f"{MANIFEST} has been changed")
    if content.get("format") != _FORMAT:
        raise DamageError(f"its format is {content.get('format')}; this version reads {_FORMAT}")
    return content


def _check_file(path: Path, expected: dict[str, Any], contents: bool) -> None:
    try:
        size = path.stat().st_size
        if size != expected["bytes"]:
            raise DamageError(f"{path.name} has {size:,} bytes instead of {expected['bytes']:,}")
        if contents and _size_and_hash(path) != expected:
            raise DamageError(f"{path.name} does not match its checksum: its content has changed")
    except FileNotFoundError:
        raise DamageError(f"{path.name} is missing") from None
    except OSError as error:
        raise DamageError(f"{path.name} cannot be read: {error.strerror}") from error
