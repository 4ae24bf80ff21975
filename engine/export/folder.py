"""A folder of exported files with its manifest: written whole or not at all, checked when read.

Neither torch nor ONNX is needed here: the folder is read where only its runner is.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine import __version__
from engine.errors import UserError

if TYPE_CHECKING:  # with torch, which the runner does without
    from engine.data.text.tokenizer import TextTokenizer
    from engine.run import Run

MANIFEST = "manifest.json"
VERSION = 1  # of the manifest's form


@contextlib.contextmanager
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
        before = made.with_name(f"{made.name}.replaced")
        if target.exists():
            target.rename(before)
        made.rename(target)
        shutil.rmtree(before, ignore_errors=True)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _refuse_other_content(target: Path, key: str) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise UserError(f"{target} is not a folder; name another one", key=key)
    others = _files(target)
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        others -= {MANIFEST, *json.loads((target / MANIFEST).read_text(encoding="utf8"))["files"]}
    if others:
        raise UserError(
            f"{target} holds what no export has written ({', '.join(sorted(others)[:3])}); name "
            "another folder, or clear this one",
            key=key,
        )


def _files(folder: Path) -> set[str]:
    """Relative names of all files below, links among them."""
    below = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return {path.relative_to(folder).as_posix() for path in below}


def tokenizer_of(run: Run) -> TextTokenizer:
    """The run's tokenizer, which tasks that are exported have."""
    tokenizer = run.task.tokenizer
    assert tokenizer is not None
    return tokenizer


def check_task(run: Run, tasks: Iterable[str], target: str) -> None:
    """Raises UserError for a run of a task that is not among those that ``target`` takes."""
    if run.task_name not in tasks:
        raise UserError(
            f"--task={run.task_name} cannot be exported to {target}; {', '.join(tasks)} can",
            key="export.format",
        )


def finish(
    folder: Path, run: Run, form: str, readme: str = "", code: str = "",
    parts: Mapping[str, Any] | None = None, **more: Any,
) -> None:  # fmt: skip
    """Write ``README.md``, the template filled with ``code`` and the manifest's values, and the
    manifest with ``parts`` beside these values."""
    values = {
        "format": form, "task": run.task_name, "engine": __version__, **more,
        "origin": run.origin, "step": run.step,
    }  # fmt: skip
    if readme:
        title = run.config.data.exp_name or run.task_name
        text = readme.format(title=title, code=code, **values)
        (folder / "README.md").write_text(text, encoding="utf8")
    write_manifest(folder, values | dict(parts or {}))


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON file; its folder is made."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf8")


def write_manifest(folder: Path, values: Mapping[str, Any]) -> None:
    """``manifest.json``: the values, and size and SHA-256 of every other file of the folder."""
    files = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": _sha256(folder / name)}
        for name in sorted(_files(folder) - {MANIFEST})
    }
    write_json(folder / MANIFEST, {"version": VERSION, **values, "files": files})


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
