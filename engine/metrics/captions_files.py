"""Files of captions to score: items with their references, or COCO results beside annotations."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import UserError
from engine.metrics.json_files import entries, identity, kind, load, string

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
    items = entries(path, load(path), _ITEM, "captions")
    if annotations is not None:
        return _with_annotations(path, items, annotations)
    candidates: dict[str, str] = {}
    references: dict[str, list[str]] = {}
    for place, entry in enumerate(items):
        where = f"{path}: entry {place}"
        if "references" not in entry and "image_id" in entry:
            raise UserError(
                f"{where} is of COCO's results form and has no references; name the file that has "
                "them with --references"
            )
        key = identity(where, entry, "id", _ITEM)
        if key in candidates:
            raise UserError(f"{where} repeats the id {key}; a candidate each is scored")
        candidates[key] = string(f"{where} (id {key})", entry, "candidate", _ITEM)
        references[key] = _references(f"{where} (id {key})", entry.get("references"))
    return Captions(candidates, references)


def _with_annotations(path: Path, items: list[dict[str, Any]], annotations: Path) -> Captions:
    found: dict[str, list[str]] = defaultdict(list)
    loaded = load(annotations)
    if not isinstance(loaded, dict) or "annotations" not in loaded:
        raise UserError(f'{annotations} has no "annotations"; a COCO caption file is wanted')
    for place, entry in enumerate(entries(annotations, loaded["annotations"], _ITEM, "captions")):
        where = f"{annotations}: annotation {place}"
        key = identity(where, entry, "image_id", _RESULT)
        found[key].append(string(where, entry, "caption", _RESULT))
    candidates: dict[str, str] = {}
    for place, entry in enumerate(items):
        where = f"{path}: entry {place}"
        key = identity(where, entry, "image_id", _RESULT)
        if key in candidates:
            raise UserError(f"{where} repeats image {key}; one caption an image is scored")
        if key not in found:
            raise UserError(f"{where}: image {key} has no caption in {annotations}")
        candidates[key] = string(f"{where} (image {key})", entry, "caption", _RESULT)
    references = {key: found[key] for key in candidates}
    return Captions(candidates, references, len(found) - len(candidates))


def _references(where: str, value: Any) -> list[str]:
    if not isinstance(value, list) or not value:
        said = "an empty list" if value == [] else kind(value)
        raise UserError(f"{where}: references is {said}; a list of texts is wanted")
    wrong = next((text for text in value if not isinstance(text, str)), None)
    if wrong is not None or None in value:
        raise UserError(f"{where}: a reference is {kind(wrong)}; a text is wanted")
    return value
