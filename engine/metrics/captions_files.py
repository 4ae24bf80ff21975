"""Files of captions to score: items with their references, or COCO results beside annotations."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import UserError

_ITEM = '{"id": …, "references": ["…", …], "candidate": "…"}'
_RESULT = '{"image_id": …, "caption": "…"}'


@dataclass(frozen=True, slots=True)
class Captions:
    """What is scored, by id as text, in the file's order."""

    candidates: dict[str, str]
    references: dict[str, list[str]]
    num_unscored: int = 0  # annotated images that have no candidate


def read(path: Path, annotations: Path | None = None) -> Captions:
    """The captions of a file. Raises UserError, which names the file and the entry.

    Without ``annotations`` the file is a list of items, ``{"id", "references", "candidate"}``; with
    them it is COCO results, ``[{"image_id", "caption"}]``, and the references are the captions of a
    COCO annotation file.
    """
    entries = _entries(path, _load(path))
    if annotations is not None:
        return _with_annotations(path, entries, annotations)
    candidates: dict[str, str] = {}
    references: dict[str, list[str]] = {}
    for place, entry in enumerate(entries):
        where = f"{path}: entry {place}"
        if "references" not in entry and "image_id" in entry:
            raise UserError(
                f"{where} is of COCO's results form and has no references; name the file that has "
                "them with --references"
            )
        key = _identity(where, entry, "id", _ITEM)
        if key in candidates:
            raise UserError(f"{where} repeats the id {key}; a candidate each is scored")
        candidates[key] = _text(f"{where} (id {key})", entry, "candidate", _ITEM)
        references[key] = _references(f"{where} (id {key})", entry.get("references"))
    return Captions(candidates, references)


def _with_annotations(path: Path, entries: list[dict[str, Any]], annotations: Path) -> Captions:
    found: dict[str, list[str]] = defaultdict(list)
    loaded = _load(annotations)
    if not isinstance(loaded, dict) or "annotations" not in loaded:
        raise UserError(f'{annotations} has no "annotations"; a COCO caption file is wanted')
    for place, entry in enumerate(_entries(annotations, loaded["annotations"])):
        where = f"{annotations}: annotation {place}"
        key = _identity(where, entry, "image_id", _RESULT)
        found[key].append(_text(where, entry, "caption", _RESULT))
    candidates: dict[str, str] = {}
    for place, entry in enumerate(entries):
        where = f"{path}: entry {place}"
        key = _identity(where, entry, "image_id", _RESULT)
        if key in candidates:
            raise UserError(f"{where} repeats image {key}; one caption an image is scored")
        if key not in found:
            raise UserError(f"{where}: image {key} has no caption in {annotations}")
        candidates[key] = _text(f"{where} (image {key})", entry, "caption", _RESULT)
    references = {key: found[key] for key in candidates}
    return Captions(candidates, references, len(found) - len(candidates))


def _load(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON in UTF-8: {error}") from error


def _entries(path: Path, loaded: Any) -> list[dict[str, Any]]:
    if not isinstance(loaded, list):
        raise UserError(f"{path} holds {_kind(loaded)}; a list of {_ITEM} is wanted")
    if not loaded:
        raise UserError(f"{path} holds no captions")
    for place, entry in enumerate(loaded):
        if not isinstance(entry, dict):
            raise UserError(f"{path}: entry {place} is {_kind(entry)}, an object is wanted")
    return loaded


def _identity(where: str, entry: dict[str, Any], name: str, form: str) -> str:
    value = entry.get(name)
    if isinstance(value, bool) or not isinstance(value, int | str):
        said = f"the {name} is {_kind(value)}" if name in entry else f"there is no {name}"
        raise UserError(f"{where}: {said}; {form} is wanted, with a number or a text as {name}")
    return str(value)


def _text(where: str, entry: dict[str, Any], name: str, form: str) -> str:
    value = entry.get(name)
    if not isinstance(value, str):
        said = f"the {name} is {_kind(value)}" if name in entry else f"there is no {name}"
        raise UserError(f"{where}: {said}; {form} is wanted")
    return value


def _references(where: str, value: Any) -> list[str]:
    if not isinstance(value, list) or not value:
        said = "an empty list" if value == [] else _kind(value)
        raise UserError(f"{where}: references is {said}; a list of texts is wanted")
    wrong = next((text for text in value if not isinstance(text, str)), None)
    if wrong is not None or None in value:
        raise UserError(f"{where}: a reference is {_kind(wrong)}; a text is wanted")
    return value


def _kind(value: Any) -> str:
    """What a JSON value is, in words."""
    if value is None:
        return "null"
    names = {bool: "true or false", int: "a number", float: "a number", str: "a text"}
    return {**names, list: "a list", dict: "an object"}[type(value)]
