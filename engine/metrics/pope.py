"""POPE: questions whether an object is in an image, by setting (Li et al. 2023), in percent.

``python -m engine.metrics.pope --labels pope.csv --results R.json`` scores a file. An answer means
no where its first sentence has "no" or "not" in it, and yes otherwise.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.errors import UserError, exit_code
from engine.metrics import yes_no
from engine.metrics.csv_files import read_csv
from engine.metrics.json_files import entries, identity, load, string

_LABEL = "question_id, label (yes or no) and, where there are several, setting"
_RESULT = "question_id, answer and, where ids return in several settings, setting"
_DIGITS = 2  # of a percentage


def score(
    labels: Sequence[bool], answers: Sequence[str | None], settings: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Figures of each setting and ``overall``; an answer of None is wrong. See ``yes_no``."""
    found = {"overall": yes_no.figures(answers, labels)}
    for setting in dict.fromkeys(settings):
        rows = [row for row, one in enumerate(settings) if one == setting]
        found[setting] = yes_no.figures([answers[r] for r in rows], [labels[r] for r in rows])
    return {
        setting: {name: round(value, _DIGITS) for name, value in figures.items()}
        for setting, figures in found.items()
    }


def read(labels: Path, results: Path) -> tuple[list[bool], list[str | None], list[str]]:
    """Labels (true is yes), the answers to them and their settings. Raises UserError.

    Both files are CSV, JSON lists or JSON lines. An answer belongs to its id; where the labels have
    an id in several settings, to its id and setting, or, without settings, to its place.
    """
    rows, said = _rows(labels, _LABEL), _rows(results, _RESULT)
    asked = [_key(labels, place, row, _LABEL) for place, row in enumerate(rows)]
    told = [_key(results, place, row, _RESULT) for place, row in enumerate(said)]
    answers = [
        string(f"{results}: entry {n}", row, "answer", _RESULT) for n, row in enumerate(said)
    ]
    settings = [setting for setting, _ in asked]
    means = [_label(f"{labels}: entry {place}", row) for place, row in enumerate(rows)]
    if not any(setting for setting, _ in told):
        if [key for _, key in told] == [key for _, key in asked]:
            return means, list(answers), settings
        asked = [("", key) for _, key in asked]
        if len(set(asked)) < len(asked):
            raise UserError(
                f"{labels} has ids in several settings, and {results} names no settings and is not "
                "in the same order; give it a setting beside each question_id"
            )
    if len(set(told)) < len(told):
        twice = Counter(told).most_common(1)[0][0]
        raise UserError(f"{results} answers question {' '.join(twice).strip()} more than once")
    by_key = dict(zip(told, answers, strict=True))
    if not by_key.keys() & set(asked):
        raise UserError(f"{results} answers none of the questions of {labels}")
    return means, [by_key.get(key) for key in asked], settings


def _rows(path: Path, form: str) -> list[dict[str, Any]]:
    if path.suffix not in (".csv", ".tsv"):
        return entries(path, load(path), form)
    return entries(path, [row for _, row in read_csv(path)[1]], form)


def _key(path: Path, place: int, row: dict[str, Any], form: str) -> tuple[str, str]:
    return str(row.get("setting") or ""), identity(
        f"{path}: entry {place}", row, "question_id", form
    )


def _label(where: str, row: dict[str, Any]) -> bool:
    said = string(where, row, "label", _LABEL).strip().lower()
    if said not in ("yes", "no"):
        raise UserError(f"{where}: the label is {said!r}; yes or no is wanted")
    return said == "yes"


def main(argv: Sequence[str]) -> int:
    """Score files and print JSON; returns the exit code. Raises UserError."""
    parser = argparse.ArgumentParser(prog="python -m engine.metrics.pope", description=__doc__)
    parser.add_argument("--labels", type=Path, required=True, help=_LABEL)
    parser.add_argument("--results", type=Path, required=True, help=_RESULT)
    arguments = parser.parse_args(argv)
    labels, answers, settings = read(arguments.labels, arguments.results)
    told: dict[str, Any] = {"unanswered": sum(answer is None for answer in answers)}
    print(json.dumps(told | score(labels, answers, settings), indent=1, ensure_ascii=False))
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(lambda: main(sys.argv[1:])))
