"""CSV files of images and texts to be scored together, and their figures.

Three forms, recognised by their columns:

    image,text[,human_score]                 pairs, with what people think of them
    image,caption,negative_caption[,kind]    SugarCrepe: a right and a wrong text for an image
    image_0,image_1,caption_0,caption_1      Winoground: two images and the text of each
"""

from __future__ import annotations

import argparse
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
    """Rows of a CSV of one of the forms, as texts by column."""

    path: Path
    form: str
    rows: list[dict[str, str]]

    def pairs(self) -> list[tuple[str, str]]:
        """(image, text) of all that is to be scored, a row's one after another."""
        columns = _FORMS[self.form]
        return [(row[image], row[text]) for row in self.rows for image, text, _ in columns]

    def _table(self, scores: Sequence[float]) -> Any:
        """Scores as fp64 [rows, pairs of a row]; NaN where an image was bad."""
        return np.asarray(scores, dtype=np.float64).reshape(len(self.rows), -1)

    def scored(self, scores: Sequence[float]) -> list[dict[str, Any]]:
        """The rows with their scores, None where an image was bad."""
        names = [name for _, _, name in _FORMS[self.form]]
        given = [
            [None if math.isnan(s) else s for s in row] for row in self._table(scores).tolist()
        ]
        pairs = zip(self.rows, given, strict=True)
        return [row | dict(zip(names, own, strict=True)) for row, own in pairs]

    def series(self, scores: Sequence[float]) -> dict[str, list[float]]:
        """Scores by what they are of, for a histogram."""
        table_RP = self._table(scores)
        if self.form == "pairs":
            return {"pairs": table_RP[:, 0].tolist()}
        right, wrong = ([0], [1]) if self.form == "sugarcrepe" else ([0, 3], [1, 2])
        return {
            "right": table_RP[:, right].ravel().tolist(),
            "wrong": table_RP[:, wrong].ravel().tolist(),
        }

    def figures(self, scores: Sequence[float], group_by: str | None = None) -> dict[str, Any]:
        """Agreement of the scores with people, or with what belongs together; None: undefined.

        Rows with a bad image or text are left out, and counted.
        """
        table_RP = self._table(scores)
        whole = np.isfinite(table_RP).all(1)
        rows = [row for row, fine in zip(self.rows, whole, strict=True) if fine]
        common: dict[str, Any] = {"form": self.form, "rows": len(self.rows)}
        common["left_out"] = len(self.rows) - len(rows)
        if not rows:
            return common
        table_RP = table_RP[whole]
        common["mean_score"] = _rounded(float(table_RP.mean()))
        if self.form == "winoground":
            found: dict[str, Any] = agreement.winoground(table_RP.reshape(-1, 2, 2))
        elif self.form == "sugarcrepe":
            kinds = [row.get("kind", "all") for row in rows]
            found = agreement.positive_over_negative(table_RP[:, 0], table_RP[:, 1], kinds)
        elif HUMAN in rows[0]:
            found = _with_people(self.path, rows, table_RP[:, 0], group_by)
        else:
            found = {}
        return common | {name: _rounded(value) for name, value in found.items()}


def _with_people(
    path: Path, rows: list[dict[str, str]], score_R: Any, group_by: str | None
) -> dict[str, Any]:
    judged = [place for place, row in enumerate(rows) if row[HUMAN].strip()]
    human = [float(rows[place][HUMAN]) for place in judged]
    found: dict[str, Any] = {"human_scores": len(judged)}
    if len(judged) < _FEW:
        return found
    score_J = score_R[judged]
    groups = [rows[place][group_by] for place in judged] if group_by else None
    found["pearson"] = agreement.pearson(score_J, human)
    found["kendall_tau_b"] = agreement.kendall_tau_b(score_J, human)
    try:
        pairs = agreement.pairwise_accuracy(score_J, human, groups)
    except ValueError as error:
        raise UserError(f"{path}: within each {group_by} {error}") from error
    found["pairwise_accuracy"] = pairs.accuracy
    found["pairwise_accuracy_without_ties"] = pairs.accuracy_without_ties
    found["tie_epsilon"] = pairs.epsilon
    return found | {"pairs_compared": pairs.num_pairs, "pairs_drawn": pairs.drawn}


def _rounded(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    if math.isnan(value):
        return None
    return float(f"{value:.{_DIGITS}g}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of a command that name a table."""
    parser.add_argument("--csv", type=Path, required=True, help="images and texts")
    parser.add_argument("--images", type=Path, help="folder of the images; default: the CSV's")
    parser.add_argument("--out", type=Path, help="default: vqa_score/NAME in the run's folder")
    parser.add_argument("--group_by", metavar="COLUMN", help="compare pairs of rows within it")


def read(path: Path, group_by: str | None = None) -> Table:
    """The table of a CSV, or of a TSV by its ending. Raises UserError naming file and line."""
    columns, numbered = read_csv(path)
    form = _form(path, columns)
    if group_by is not None and group_by not in columns:
        raise UserError(f"{path} has no column {group_by}; its columns are: {', '.join(columns)}")
    for line, row in numbered:
        _check_human(f"{path}, line {line}", row.get(HUMAN, ""))
    rows = [row for _, row in numbered]
    if not rows:
        raise UserError(f"{path} has no rows")
    return Table(path, form, rows)


def _form(path: Path, columns: list[str]) -> str:
    for form in reversed(_FORMS):
        if all(name in columns for image, text, _ in _FORMS[form] for name in (image, text)):
            return form
    wanted = [
        ",".join(dict.fromkeys(name for image, text, _ in form for name in (image, text)))
        for form in _FORMS.values()
    ]
    raise UserError(
        f"{path} has the columns {', '.join(columns)}; wanted are " + ", or ".join(wanted)
    )


def _check_human(where: str, value: str) -> None:
    try:
        fine = not value.strip() or math.isfinite(float(value))
    except ValueError:
        fine = False
    if not fine:
        raise UserError(f"{where}: {HUMAN} is {value!r}, not a number")


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
