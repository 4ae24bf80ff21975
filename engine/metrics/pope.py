"""Answers of yes and no, scored as POPE does it (Li et al. 2023), in percent.

POPE asks whether an object is in an image, in several settings. An answer means no where its first
sentence has the word "no" or "not", and yes otherwise; capital letters make no difference here.
``python -m engine.metrics.pope --labels pope.csv --results R.json`` scores a file.
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
from engine.metrics.files import entries, keyed, load, read_csv, string

_NO = {"no", "not"}
_LABEL = "question_id, label (yes or no) and, where there are several, setting"
_RESULT = "question_id, answer and, where ids return in several settings, setting"


def means_yes(answer: str) -> bool:
    """Whether the first sentence of an answer has neither "no" nor "not"."""
    return not _NO & _words(answer)


def is_clear(answer: str) -> bool:
    """Whether an answer has the word yes, no or not; others count as yes."""
    return bool((_NO | {"yes"}) & _words(answer))


def _words(answer: str) -> set[str]:
    return set(answer.split(".")[0].replace(",", "").lower().split())


def figures(answers: Sequence[str | None], labels: Sequence[bool]) -> dict[str, float]:
    """Figures of answers against labels (true is yes); an answer of None is wrong, and not a yes.

    ``yes_share`` is the share of answers that mean yes, ``unclear`` how many have neither yes nor
    no, which POPE's rule counts as yes. Precision is 0 where no answer is yes, recall where no
    label is. Raises ValueError where there is nothing to count.
    """
    if not labels:
        raise ValueError("there are no questions of yes and no to score")
    pairs = [
        (None if answer is None else means_yes(answer), label)
        for answer, label in zip(answers, labels, strict=True)
    ]
    num_hits = pairs.count((True, True))
    num_yes, num_labelled = sum(bool(yes) for yes, _ in pairs), sum(labels)
    both = num_yes + num_labelled
    return {
        "accuracy": 100 * sum(yes == label for yes, label in pairs) / len(pairs),
        "precision": 100 * num_hits / num_yes if num_yes else 0.0,
        "recall": 100 * num_hits / num_labelled if num_labelled else 0.0,
        "f1": 100 * 2 * num_hits / both if both else 0.0,
        "yes_share": 100 * num_yes / len(pairs),
        "unclear": sum(answer is not None and not is_clear(answer) for answer in answers),
        "questions": len(pairs),
    }


def rounded(values: dict[str, float]) -> dict[str, float]:
    """Figures to two decimals, as the official evaluations print them."""
    return {name: round(value, 2) for name, value in values.items()}


def score(
    labels: Sequence[bool], answers: Sequence[str | None], settings: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Figures of each setting and ``overall``; an answer of None is wrong."""
    found = {"overall": figures(answers, labels)}
    for setting in dict.fromkeys(settings):
        rows = [row for row, one in enumerate(settings) if one == setting]
        found[setting] = figures([answers[r] for r in rows], [labels[r] for r in rows])
    return {setting: rounded(values) for setting, values in found.items()}


def read(labels: Path, results: Path) -> tuple[list[bool], list[str | None], list[str]]:
    """Labels (true is yes), the answers to them and their settings. Raises UserError.

    Both files are CSV, JSON lists or JSON lines. An answer belongs to its id; where the labels have
    an id in several settings, to its id and setting, or, without settings, to its place.
    """
    keys, is_yes = [], []
    for where, key, row in keyed(labels, _rows(labels, _LABEL), "question_id", _LABEL):
        keys.append((str(row.get("setting") or ""), key))
        is_yes.append(_is_yes(where, string(where, row, "label", _LABEL)))
    answered, answers = [], []
    for where, key, row in keyed(results, _rows(results, _RESULT), "question_id", _RESULT):
        answered.append((str(row.get("setting") or ""), key))
        answers.append(string(where, row, "answer", _RESULT))
    settings = [setting for setting, _ in keys]
    if not any(setting for setting, _ in answered):
        if [key for _, key in answered] == [key for _, key in keys]:
            return is_yes, list(answers), settings
        keys = [("", key) for _, key in keys]
        if len(set(keys)) < len(keys):
            raise UserError(
                f"{labels} has ids in several settings, and {results} names no settings and is not "
                "in the same order; give it a setting beside each question_id"
            )
    if len(set(answered)) < len(answered):
        twice = Counter(answered).most_common(1)[0][0]
        raise UserError(f"{results} answers question {' '.join(twice).strip()} more than once")
    by_key = dict(zip(answered, answers, strict=True))
    if not by_key.keys() & set(keys):
        raise UserError(f"{results} answers none of the questions of {labels}")
    return is_yes, [by_key.get(key) for key in keys], settings


def _rows(path: Path, form: str) -> list[dict[str, Any]]:
    is_csv = path.suffix in (".csv", ".tsv")
    return entries(path, [row for _, row in read_csv(path)[1]] if is_csv else load(path), form)


def _is_yes(where: str, label: str) -> bool:
    plain = label.strip().lower()
    if plain not in ("yes", "no"):
        raise UserError(f"{where}: the label is {plain!r}; yes or no is wanted")
    return plain == "yes"


def main(argv: Sequence[str]) -> int:
    """Score files and print JSON; returns the exit code. Raises UserError."""
    parser = argparse.ArgumentParser(prog="python -m engine.metrics.pope", description=__doc__)
    parser.add_argument("--labels", type=Path, required=True, help=_LABEL)
    parser.add_argument("--results", type=Path, required=True, help=_RESULT)
    arguments = parser.parse_args(argv)
    labels, answers, settings = read(arguments.labels, arguments.results)
    report: dict[str, Any] = {"unanswered": sum(answer is None for answer in answers)}
    print(json.dumps(report | score(labels, answers, settings), indent=1, ensure_ascii=False))
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(lambda: main(sys.argv[1:])))
