"""A folder of exported files with its manifest: written whole or not at all, checked when read.

Neither torch nor ONNX is needed here: the folder is read where only its runner is.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine import __version__
from engine.errors import UserError

if TYPE_CHECKING:  # with torch, which the runner does without
    from engine.data.text.tokenizer import TextTokenizer
    from engine.run import Run

MANIFEST = "manifest.json"
VERSION = 1  # of the manifest's form


@contextmanager
def new_folder(target: Path, key: str) -> Iterator[Path]:
    """A hidden folder beside ``target``, which takes its place at the block's end.

    An earlier export there is replaced. Raises UserError at ``key`` where something else is
    there, and what the block raises; then ``target`` is as it was.
    """
    _refuse_other_content(target, key)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        made = target.parent / f".{target.name}.writing-{secrets.token_hex(4)}"
        made.mkdir()
    except OSError as error:
        raise UserError(f"cannot write beside {target}: {error.strerror}", key=key) from error
    try:
        yield made
        if target.exists():
            before = made.with_name(f"{made.name}.replaced")
            target.rename(before)
            made.rename(target)
            shutil.rmtree(before)
        else:
            made.rename(target)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _refuse_other_content(target: Path, key: str) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise UserError(f"{target} is not a folder; name another one", key=key)
    found = _files(target)
    if not found:
        return
    try:
        listed = json.loads((target / MANIFEST).read_text(encoding="utf8"))["files"]
        others = sorted(found - {MANIFEST, *listed})
    except (OSError, ValueError, KeyError, TypeError):
        others = sorted(found)
    if others:
        raise UserError(
            f"{target} holds what no export has written ({', '.join(others[:3])}); name another "
            "folder, or clear this one",
            key=key,
        )


def _files(folder: Path) -> set[str]:
    """Relative names of all files below, links among them."""
    return {
        (Path(place) / name).relative_to(folder).as_posix()
        for place, folders, names in os.walk(folder)
        for name in (*names, *(n for n in folders if (Path(place) / n).is_symlink()))
    }


def tokenizer_of(run: Run) -> TextTokenizer:
    """The run's tokenizer, which tasks that are exported have."""
    tokenizer = run.task.tokenizer
    assert tokenizer is not None
    return tokenizer


def described(run: Run, form: str, **more: Any) -> dict[str, Any]:
    """What a manifest and a README say of an export: its form, and the run that it is from."""
    return {
        "format": form, "task": run.task_name, "engine": __version__, **more,
        "origin": run.origin, "step": run.step,
    }  # fmt: skip


def write_readme(folder: Path, template: str, run: Run, **values: Any) -> None:
    """``README.md``: the template with ``values`` in it, and the run's name as its title."""
    title = run.config.data.exp_name or run.task_name
    text = template.format(title=title, **values)
    (folder / "README.md").write_text(text, encoding="utf8")


def write_manifest(folder: Path, values: Mapping[str, Any]) -> None:
    """``manifest.json``: the values, and size and SHA-256 of every other file of the folder."""
    files = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": _sha256(folder / name)}
        for name in sorted(_files(folder) - {MANIFEST})
    }
    text = json.dumps({"version": VERSION, **values, "files": files}, ensure_ascii=False, indent=1)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf8")


def read_manifest(folder: Path, *, verify: bool = False) -> dict[str, Any]:
    """An export's manifest, its files checked by their sizes; with ``verify`` by all their bytes.

    Raises UserError for a folder that is not an export, and for one that is not whole.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf8"))
        version, files = manifest["version"], manifest["files"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{folder} is not an exported folder: {MANIFEST} cannot be read ({error}); make "
            "one with --mode=export"
        ) from error
    if version != VERSION:
        raise UserError(
            f"{folder / MANIFEST} is of form {version}, and this engine reads form {VERSION}; "
            "export again"
        )
    for name, known in files:
        path = folder / name
        size = path.stat().st_size if path.is_file() else None
        if size != known["bytes"] or (verify and _sha256(path) != known["sha256"]):
            what = "missing" if size is None else "damaged"
            raise UserError(f"{path} is {what}: copy the folder again, or export again")
    return manifest


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
