"""A run's YAML file with what it inherits and what the command line overrides, as one tree."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from engine.config.yaml_source import MAX_BYTES, Fault, Located, merge, parse
from engine.errors import UserError

COMMAND_LINE = "command line"


def read_tree(path: str | Path, overrides: Sequence[str]) -> tuple[Located, list[Fault]]:
    """The file deep-merged over its ``base`` files, the overrides on top, and all faults so far.

    Raises UserError where a file or an override cannot be read at all.
    """
    faults: list[Fault] = []
    tree = _read_file(Path(path), "", (), faults)
    for override in overrides:
        tree = _apply(tree, override, faults)
    return tree, faults


def _read_file(path: Path, asked_at: str, above: tuple[Path, ...], faults: list[Fault]) -> Located:
    """``above`` are the files that led here through ``base``, ``asked_at`` the last one's line."""
    prefix = f"{asked_at}: base: " if asked_at else ""
    if path.resolve() in above:
        chain = " → ".join(file.name for file in (*above, path))
        raise UserError(f"{prefix}the files inherit from one another ({chain}); break the circle")
    document = parse(_text(path, prefix), str(path))
    faults += document.faults
    root = document.root or Located({}, f"{path}:1")
    if not isinstance(root.value, dict):
        raise UserError(f"{root.place}: the file must hold sections, such as 'data:'; see configs/")
    base = root.value.pop("base", None)
    if base is None:
        return root
    if not isinstance(base.value, str) or not base.value or "\0" in base.value:
        faults.append(Fault(base.place, "base", "must be a file's name; write base: other.yaml"))
        return root
    below = Path(os.path.normpath(path.parent / base.value))
    return merge(_read_file(below, base.place, (*above, path.resolve()), faults), root)


def _text(path: Path, prefix: str) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        reason = error.strerror or "cannot be read"
        raise UserError(f"{prefix}{path}: {reason}; give the path of a YAML file") from error
    if len(content) > MAX_BYTES:
        raise UserError(f"{path}: larger than {MAX_BYTES:,} bytes; a configuration is small text")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: not UTF-8 text; save the file as UTF-8") from error


def _apply(tree: Located, override: str, faults: list[Fault]) -> Located:
    """``tree`` with ``a.b=value`` set; a list's item is named by its index."""
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise UserError(
            f"{COMMAND_LINE}: {override!r} is no override; write section.key=value without spaces"
        )
    name = f"{COMMAND_LINE}: {key.strip()}"
    document = parse(text, name, place=lambda line: name)
    faults += [
        Fault(COMMAND_LINE, ".".join(filter(None, (key.strip(), fault.path))), fault.message)
        for fault in document.faults
    ]
    if document.root is None and document.faults:
        return tree
    return _set(tree, parts, _relocate(document.root or Located(None, COMMAND_LINE)))


def _relocate(located: Located) -> Located:
    value = located.value
    if isinstance(value, dict):
        value = {key: _relocate(item) for key, item in value.items()}
    elif isinstance(value, list | tuple):
        value = type(value)(_relocate(item) for item in value)
    return Located(value, COMMAND_LINE)


def _set(tree: Located | None, parts: list[str], new: Located) -> Located:
    if not parts:
        return merge(tree, new) if tree else new
    head, *rest = parts
    if tree and isinstance(tree.value, list | tuple) and head.isdecimal():
        index = int(head)
        if index < len(tree.value):
            items = list(tree.value)
            items[index] = _set(items[index], rest, new)
            return Located(type(tree.value)(items), tree.place)
    inside = dict(tree.value) if tree and isinstance(tree.value, dict) else {}
    inside[head] = _set(inside.get(head), rest, new)
    return Located(inside, tree.place if tree and isinstance(tree.value, dict) else COMMAND_LINE)
