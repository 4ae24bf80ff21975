"""YAML file + overrides → validated configuration, or every fault at once with its place."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from engine.config.dump import resolved_yaml as resolved_yaml
from engine.config.explain import explain
from engine.config.read import read_tree
from engine.config.rules import broken
from engine.config.schema import Config
from engine.config.yaml_source import Fault, places, plain
from engine.errors import UserError


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
        return _where(key, self.places, str(self.path))


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration of a YAML file. Raises UserError with all faults, a line each."""
    return load_with_places(path, overrides).config


def load_with_places(path: str | Path, overrides: Sequence[str] = ()) -> Loaded:
    """Like ``load``, and tells where each key was written.

    Overrides are ``section.key=value`` with a YAML value. Raises UserError with all faults, a line
    each: ``file:line: dotted.key: message; remedy``.
    """
    tree, faults = read_tree(path, overrides)
    known_places = places(tree)
    if "input" in known_places:  # the short form
        known_places["generate.input"] = known_places["input"]
    raw = plain(tree)
    config, wrong = _validate(raw)
    faults += [
        Fault(_where(".".join(keys), known_places, str(path)), ".".join(keys), message)
        for keys, message in wrong.items()
    ]
    faulty = [fault.path for fault in faults]
    if config is None:
        config = _validate(_without(raw, wrong))[0]
    for rule in broken(config) if config else ():
        if not any(_touches(key, fault) for key in rule.keys for fault in faulty):
            key = rule.keys[0]
            written = next((name for name in rule.keys if name in known_places), key)
            place = _where(written, known_places, str(path))
            faults.append(Fault(place, key, rule.message))
    if faults:
        raise UserError("\n".join(str(fault) for fault in sorted(faults, key=_reading_order)))
    assert config is not None
    return Loaded(config, Path(path), known_places)


def _validate(raw: Any) -> tuple[Config | None, dict[tuple[str, ...], str]]:
    try:
        return Config.model_validate(raw), {}
    except ValidationError as error:
        return None, explain(error.errors(include_url=False), raw)


def _without(raw: Any, paths: Iterable[tuple[str, ...]]) -> Any:
    """``raw`` less the faulty keys, so that the rules can be asked about the others."""
    raw = copy.deepcopy(raw)
    for path in paths:
        _drop(raw, path)
    return raw


def _drop(mapping: dict[str, Any], path: Sequence[str]) -> None:
    head, *rest = path
    inside = mapping.get(head)
    if rest and isinstance(inside, dict) and rest[0] in inside:
        _drop(inside, rest)
    else:
        mapping.pop(head, None)


def _touches(key: str, other: str) -> bool:
    return f"{key}.".startswith(f"{other}.") or f"{other}.".startswith(f"{key}.")


def _where(key: str, known: Mapping[str, str], otherwise: str) -> str:
    while key and key not in known:
        key = key.rpartition(".")[0]
    return known.get(key, otherwise)


def _reading_order(fault: Fault) -> tuple[str, int]:
    name, _, line = fault.place.rpartition(":")
    return (name, int(line)) if line.isdecimal() else (fault.place, 0)
