"""CSV files of images and texts to be scored together, and their figures.

Three forms, recognised by their columns:

    image,text[,human_score]                 pairs, with what people think of them
    image,caption,negative_caption[,kind]    SugarCrepe: a right and a wrong text for an image
    image_0,image_1,caption_0,caption_1      Winoground: two images and the text of each
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from engine.errors import UserError
from engine.logs.charts import histogram
from engine.logs.samples import lines, write_whole
from engine.metrics import agreement
from engine.metrics.files import read_csv

HUMAN = "human_score"
_DIGITS = 6  # of a figure
_FEW = 2  # items that a correlation takes
_FORMS: dict[str, list[tuple[str, str, str]]] = {  # (image's column, text's, the score's name)
    "pairs": [("image", "text", "vqa_score")],
    "sugarcrepe": [
        ("image", "caption", "vqa_score"),
        ("image", "negative_caption", "vqa_score_negative"),
    ],
    "winoground": [
        (f"image_{i}", f"caption_{j}", f"vqa_score_{i}{j}") for i, j in product((0, 1), repeat=2)
    ],
}


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of a CSV of one of the forms, as texts by column. Scores are NaN for bad images."""

    path: Path
    form: str
    rows: list[dict[str, str]]

    def pairs(self) -> list[tuple[str, str]]:
        """(image, text) of all that is to be scored, a row's one after another."""
        columns = _FORMS[self.form]
        return [(row[image], row[text]) for row in self.rows for image, text, _ in columns]

    def _by_row(self, scores: Sequence[float]) -> np.ndarray:
        """Scores as fp64 [rows, pairs of a row]."""
        return np.asarray(scores, dtype=np.float64).reshape(len(self.rows), -1)

    def scored(self, scores: Sequence[float]) -> list[dict[str, Any]]:
        """The rows with their scores, None for NaN."""
        names = [name for _, _, name in _FORMS[self.form]]
        pairs = zip(self.rows, self._by_row(scores).tolist(), strict=True)
        return [
            row | {n: None if math.isnan(s) else s for n, s in zip(names, own, strict=True)}
            for row, own in pairs
        ]

    def series(self, scores: Sequence[float]) -> dict[str, list[float]]:
        """Scores by what they are of, for a histogram."""
        parts = {
            "pairs": {"pairs": [0]},
            "sugarcrepe": {"right": [0], "wrong": [1]},
            "winoground": {"right": [0, 3], "wrong": [1, 2]},
        }[self.form]
        score_RP = self._by_row(scores)
        return {name: score_RP[:, places].ravel().tolist() for name, places in parts.items()}

    def figures(self, scores: Sequence[float], group_by: str | None = None) -> dict[str, Any]:
        """Agreement of the scores with people, or with what belongs together; None: undefined.

        Rows with a bad image or text are left out, and counted.
        """
        score_RP = self._by_row(scores)
        whole = np.isfinite(score_RP).all(1)
        rows = [row for row, fine in zip(self.rows, whole, strict=True) if fine]
        score_RP, left_out = score_RP[whole], len(self.rows) - len(rows)
        found: dict[str, Any] = {"form": self.form, "rows": len(self.rows), "left_out": left_out}
        if not rows:
            return found
        found["mean_score"] = float(score_RP.mean())
        if self.form == "winoground":
            found |= agreement.winoground(score_RP.reshape(-1, 2, 2))
        elif self.form == "sugarcrepe":
            kinds = [row.get("kind", "all") for row in rows]
            found |= agreement.positive_over_negative(score_RP[:, 0], score_RP[:, 1], kinds)
        elif HUMAN in rows[0]:
            found |= _with_people(self.path, rows, score_RP[:, 0], group_by)
        return {name: _rounded(value) for name, value in found.items()}


def _with_people(
    path: Path, rows: list[dict[str, str]], score_R: np.ndarray, group_by: str | None
) -> dict[str, Any]:
    judged = [place for place, row in enumerate(rows) if row[HUMAN].strip()]
    if len(judged) < _FEW:
        return {"human_scores": len(judged)}
    score_J, human = score_R[judged], [float(rows[place][HUMAN]) for place in judged]
    groups = [rows[place][group_by] for place in judged] if group_by else None
    try:
        pairs = agreement.pairwise_accuracy(score_J, human, groups)
    except ValueError as error:
        raise UserError(f"{path}: within each {group_by} {error}") from error
    return {
        "human_scores": len(judged),
        "pearson": agreement.pearson(score_J, human),
        "kendall_tau_b": agreement.kendall_tau_b(score_J, human),
        **pairs,
    }


def _rounded(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return None if math.isnan(value) else float(f"{value:.{_DIGITS}g}")


def read(path: Path, group_by: str | None = None) -> Table:
    """The table of a CSV, or of a TSV by its ending. Raises UserError naming file and line."""
    columns, numbered = read_csv(path)
    named = {
        form: dict.fromkeys(name for *pair, _ in parts for name in pair)
        for form, parts in _FORMS.items()
    }
    form = next((form for form in reversed(named) if named[form].keys() <= set(columns)), None)
    if form is None:
        wanted = ", or ".join(",".join(names) for names in named.values())
        raise UserError(f"{path} has the columns {', '.join(columns)}; wanted are {wanted}")
    if group_by is not None and group_by not in columns:
        raise UserError(f"{path} has no column {group_by}; its columns are: {', '.join(columns)}")
    for line, row in numbered:
        value = row.get(HUMAN, "")
        try:
            fine = not value.strip() or math.isfinite(float(value))
        except ValueError:
            fine = False
        if not fine:
            raise UserError(f"{path}, line {line}: {HUMAN} is {value!r}, not a number")
    if not numbered:
        raise UserError(f"{path} has no rows")
    return Table(path, form, [row for _, row in numbered])


def write(
    folder: Path, table: Table, scores: Sequence[float], figures: Mapping[str, Any], unit: str
) -> None:
    """Write ``scores.jsonl``, ``scores.csv``, ``figures.json``, ``histogram.png``. UserError."""
    rows = table.scored(scores)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / "scores.jsonl", lines(rows))
        write_whole(folder / "scores.csv", text.getvalue())
        write_whole(folder / "figures.json", json.dumps(figures, indent=1) + "\n")
        if any(map(math.isfinite, scores)):
            title = f"Scores of {table.path.name}"
            histogram(title, table.series(scores), unit).save(folder / "histogram.png")
    except OSError as error:
        raise UserError(f"nothing can be written to {folder}: {error.strerror}") from error
