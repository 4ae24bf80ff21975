"""YAML file + overrides → validated configuration, or every fault at once with its place."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.config.dump import resolved_yaml as resolved_yaml
from engine.config.explain import validate
from engine.config.options import override_path, with_options
from engine.config.rules import violations
from engine.config.schema import Config
from engine.config.yaml_source import MAX_BYTES, Fault, Located, merge, parse, places, plain
from engine.errors import UserError, message_of

COMMAND_LINE = "command line"


@dataclass(frozen=True, slots=True)
class Loaded:
    """A configuration, and where the user wrote each of its keys."""

    config: Config
    path: Path
    places: Mapping[str, str]

    def where(self, key: str) -> str:
        """``file:line`` of a dotted key, or of the nearest section around it; else the file.

        A key that was set by an override is at "command line".
        """
        return _where(key, self.places, self.path)

    def located(self, error: UserError) -> str:
        """The error's message, led by its key and the file and line in which that was written."""
        message = message_of(error)
        if not error.key:
            return message
        named = message.startswith(error.key)  # a message may open with its key
        return f"{self.where(error.key)}: {'' if named else error.key + ': '}{message}"


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration of a YAML file. Raises UserError with all faults, a line each."""
    return load_with_places(path, overrides).config


def load_with_places(
    path: str | Path, overrides: Sequence[str] = (), named: Sequence[str] | None = None
) -> Loaded:
    """Like ``load``, with the place where each key was written.

    ``named`` are the task and the mode that a run was started with, where one is started: options
    of modules from outside that it does not use are refused.

    The file is merged key by key over its ``base`` files, then come the overrides,
    ``section.key=value`` with a YAML value. Raises UserError with all faults, a line each:
    ``file:line: dotted.key: message; remedy``.
    """
    path, faults = Path(path), list[Fault]()
    tree = _read_file(path, "", (), faults)
    for override in sorted(overrides, key=lambda text: text.startswith("options.")):
        tree = _apply(tree, override, faults, named or ())  # options last: parts are known by then
    known = places(tree)
    if "input" in known:  # the short form
        known["generate.input"] = known["input"]

    def add(message: str, *keys: str) -> None:
        """A fault at the first of the keys, or in the line of the first one that is written."""
        place = _where(next((key for key in keys if key in known), keys[0]), known, path)
        faults.append(Fault(place, keys[0], message))

    raw = plain(tree)
    config, wrong = validate(Config, raw)
    for keys, message in wrong.items():
        add(message, ".".join(keys))
    faulty = [fault.path for fault in faults]
    if config is None:  # the rules are applied to what is left
        config, _ = validate(Config, _without(raw, wrong))
    if config is not None:
        config, of_options = with_options(config, named)
        for key, message in of_options.items():
            add(message, key)
        for message, *names in violations(config):
            if not any(_touches(key, fault) for key in names for fault in faulty):
                add(message, *names)
    if faults:
        raise UserError("\n".join(str(fault) for fault in sorted(faults, key=_reading_order)))
    assert config is not None
    return Loaded(config, path, known)


def _without(raw: Any, paths: Iterable[Sequence[str]]) -> Any:
    """``raw`` less the faulty keys."""
    raw = copy.deepcopy(raw)
    for path in paths:
        inside, (head, *rest) = raw, path
        while rest and isinstance(inside.get(head), dict) and rest[0] in inside[head]:
            inside, (head, *rest) = inside[head], rest
        inside.pop(head, None)
    return raw


def _touches(key: str, other: str) -> bool:
    return f"{key}.".startswith(f"{other}.") or f"{other}.".startswith(f"{key}.")


def _where(key: str, known: Mapping[str, str], otherwise: Path) -> str:
    while key and key not in known:
        key = key.rpartition(".")[0]
    return known.get(key, str(otherwise))


def _reading_order(fault: Fault) -> tuple[str, int]:
    name, _, line = fault.place.rpartition(":")
    return (name, int(line)) if line.isdecimal() else (fault.place, 0)


def _read_file(path: Path, named_at: str, above: tuple[Path, ...], faults: list[Fault]) -> Located:
    """The file over its ``base`` files.

    ``above`` are the files that led here through ``base``, ``named_at`` the last one's line.
    """
    prefix = f"{named_at}: base: " if named_at else ""
    if path.resolve() in above:
        chain = " → ".join(file.name for file in (*above, path))
        raise UserError(f"{prefix}the files inherit from one another ({chain}); break the circle")
    root = parse(_text(path, prefix), str(path), faults) or Located({}, f"{path}:1")
    if not isinstance(root.value, dict):
        raise UserError(f"{root.place}: the file must hold sections, such as 'data:'; see configs/")
    base = root.value.pop("base", None)
    if base is None:
        return root
    if not isinstance(base.value, str) or not base.value or "\0" in base.value:
        faults.append(Fault(base.place, "base", "must be a file's name; write base: other.yaml"))
        return root
    below = Path(os.path.normpath(path.parent / base.value))
    inherited = _read_file(below, base.place, (*above, path.resolve()), faults)
    inherited.value.pop("task", None)  # that of another run
    return merge(inherited, root)


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


def _apply(tree: Located, override: str, faults: list[Fault], named: Sequence[str]) -> Located:
    """``tree`` with ``a.b=value`` set; a list's item is named by its index."""
    key, equals, text = override.partition("=")
    path = tuple(key.strip().split("."))
    if not equals or not all(path):
        raise UserError(
            f"{COMMAND_LINE}: {override!r} is not an override; write section.key=value without "
            "spaces"
        )
    before = len(faults)
    value = parse(text, COMMAND_LINE, faults, path)
    if value is None and len(faults) > before:
        return tree
    value = value or Located(None, COMMAND_LINE)
    if path[0] == "options" and len(path) > 1:
        known = re.findall(r"\w+(?:\.\w+)+", str([*named, plain(tree)]))
        path = tuple(override_path(path, known, isinstance(value.value, dict)))
    return _set(tree, path, value)


def _set(tree: Located | None, path: Sequence[str], new: Located) -> Located:
    if not path:
        return merge(tree, new) if tree else new
    head, *rest = path
    held, place = (tree.value, tree.place) if tree else (None, COMMAND_LINE)
    if isinstance(held, list | tuple) and head.isdecimal() and int(head) < len(held):
        items = list(held)
        items[int(head)] = _set(items[int(head)], rest, new)
        return Located(type(held)(items), place)
    if not isinstance(held, dict):
        held, place = {}, COMMAND_LINE
    return Located({**held, head: _set(held.get(head), rest, new)}, place)
