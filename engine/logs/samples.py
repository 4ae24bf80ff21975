"""What a model generated for a validation set: files beside the run, two an evaluation.

samples/DATASET.step_N.jsonl          a line an image or question, with its id and references
        DATASET.step_N.results.json   [{"image_id", "caption"}] or [{"question_id", "answer"}], as
                                      COCO's and VQA's own programs read results; or the labels
        DATASET.step_N.curve.png      precision and recall of labels
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

FOLDER = "samples"
KEEP = 20  # evaluations of a dataset
_ENDINGS = (".jsonl", ".results.json", ".curve.png")
_PAIRS = (("question_id", "answer"), ("image_id", "caption"), ("image_id", "labels"))


def write_whole(path: Path, text: str) -> Path:
    """Write a text file whole or not at all; returns its path."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        # half a surrogate, of a file name that is not UTF-8, becomes \udcNN: JSON's own escape
        temporary.write_text(text, encoding="utf8", errors="backslashreplace")
        return temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def make_writable(folder: Path) -> None:
    """Make a folder and see that files can be written to it; those there stay. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def write_samples(
    folder: Path, dataset: str, label: str, predictions: Iterable[Mapping[str, Any]]
) -> None:
    """Write both forms; ``label`` is ``step_N``, or a name for weights that have no step.

    Of a dataset's steps the last ``KEEP`` stay, and this one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows, name = list(predictions), quote(dataset, safe=" ")
    write_whole(folder / f"{name}.{label}.jsonl", lines(rows))
    write_whole(folder / f"{name}.{label}.results.json", results(rows))
    steps = re.compile(re.escape(name) + r"\.step_(\d+)\.jsonl")
    found = sorted(int(m[1]) for p in folder.iterdir() if (m := steps.fullmatch(p.name)))
    for step in found[:-KEEP]:
        if f"step_{step}" != label:
            for ending in _ENDINGS:
                (folder / f"{name}.step_{step}{ending}").unlink(missing_ok=True)


def lines(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line of JSON a row."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def results(rows: Sequence[Mapping[str, Any]]) -> str:
    """The official form; its ids are whole numbers, and so are these where all of them can be."""
    key, value = next(pair for pair in _PAIRS if all(set(pair) <= row.keys() for row in rows))
    all_numbers = all(re.fullmatch("0|[1-9][0-9]*", row[key]) for row in rows)
    pairs = [{key: int(row[key]) if all_numbers else row[key], value: row[value]} for row in rows]
    return json.dumps(pairs, ensure_ascii=False, indent=0)
