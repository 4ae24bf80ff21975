"""Accuracy of answers to questions about images, in percent.

The accuracy of VQA v2 (Goyal et al. 2017), equal to that of its official evaluation; beside it
exact match, accuracy as GQA has it (Hudson and Manning 2019), figures of the questions of yes and
no, and what the most common answer would score. ``python -m engine.metrics.vqa`` scores files.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import exit_code
from engine.metrics import vqa_files, yes_no
from engine.metrics.vqa_files import Question
from engine.metrics.vqa_words import normalise, one_line

_DIGITS = 2  # of a percentage, as the official evaluation rounds
_ENOUGH = 3  # annotators of one mind that make an answer wholly right


@dataclass(frozen=True, slots=True)
class Scores:
    """Percentages by name, in the order in which kinds first occur among the questions."""

    overall: float
    per_answer_type: dict[str, float]
    per_question_type: dict[str, float]
    exact_match: float
    gqa: dict[str, float]  # accuracy, and of questions of yes and no (binary) and others (open)
    yes_no: dict[str, float]  # empty where no question is of yes and no
    majority: dict[str, Any]  # what the commonest answers would score
    per_question: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """All but the single questions, under the official evaluation's names where it has one."""
        return {
            "overall": self.overall,
            "perAnswerType": self.per_answer_type,
            "perQuestionType": self.per_question_type,
            "exact_match": self.exact_match,
            "gqa": self.gqa,
            "yes_no": self.yes_no,
            "majority": self.majority,
        }


def vqa_accuracy(answer: str, answers: Sequence[str]) -> float:
    """Official accuracy of one answer, 0 … 1: mean over all annotators but one of min(n / 3, 1).

    n is how many of them gave the answer. Answers are normalised only where annotators differ. Of
    fewer than four annotators, n may stay under 3 for any answer. Raises ValueError without any.
    """
    if not answers:
        raise ValueError("an answer is scored against annotators' answers; there are none")
    given, said = [one_line(one) for one in answers], one_line(answer)
    if len(set(given)) > 1:
        given, said = [normalise(one) for one in given], normalise(said)
    hits = given.count(said)
    # summed one by one, as the official evaluation does it: figures must round alike
    return sum(min(1.0, (hits - (one == said)) / _ENOUGH) for one in given) / len(given)


def exact_match(answer: str, main: str) -> bool:
    """Whether an answer is the main one once both are normalised."""
    return normalise(one_line(answer)) == normalise(one_line(main))


def gqa_match(answer: str, main: str) -> bool:
    """Whether an answer is the main one but for capitals, outer spaces and a last full stop."""
    return answer.strip().rstrip(".").lower() == main.strip().lower()


def score(
    questions: Mapping[str, Question], answers: Mapping[str, str], *, exact: bool = False
) -> Scores:
    """Score the answers to questions, by id; a question without an answer counts as wrong.

    With ``exact`` exact match takes the place of the official accuracy, which takes no note of a
    single annotator. Raises ValueError where there is no question.
    """
    if not questions:
        raise ValueError("there are no questions to score")
    said = [answers.get(key) for key in questions]
    pairs = list(zip(questions.values(), said, strict=True))
    accuracy = _exact if exact else _official
    accuracies = [0.0 if a is None else accuracy(a, q) for q, a in pairs]
    asked = [q for q, _ in pairs]
    binary = [(a, yes_no.read(q.main)) for q, a in pairs if q.is_binary]
    right = [a is not None and gqa_match(a, q.main) for q, a in pairs]
    kinds = [None, *("binary" if q.is_binary else "open" for q in asked)]
    return Scores(
        overall=_percent(accuracies),
        per_answer_type=_by(accuracies, (q.kind for q in asked)),
        per_question_type=_by(accuracies, (q.question_type for q in asked)),
        exact_match=_percent([a is not None and exact_match(a, q.main) for q, a in pairs]),
        gqa={"accuracy": _percent(right)} | _by(right, kinds[1:]),
        yes_no=_rounded(yes_no.figures(*zip(*binary, strict=True))) if binary else {},
        majority=_majority(asked, accuracy),
        per_question=dict(zip(questions, map(_percent, ([a] for a in accuracies)), strict=True)),
    )


def _official(answer: str, question: Question) -> float:
    return vqa_accuracy(answer, question.answers)


def _exact(answer: str, question: Question) -> float:
    return float(exact_match(answer, question.main))


def _majority(
    asked: Sequence[Question], accuracy: Callable[[str, Question], float]
) -> dict[str, Any]:
    """Accuracy of the commonest answer to all questions, and to all of a question's type."""
    every = Counter(q.main for q in asked)
    of_type: dict[str | None, Counter[str]] = defaultdict(Counter)
    for q in asked:
        of_type[q.question_type][q.main] += 1
    commonest = every.most_common(1)[0][0]
    by_type = {kind: counts.most_common(1)[0][0] for kind, counts in of_type.items()}
    return {
        "answer": commonest,
        "overall": _percent([accuracy(commonest, q) for q in asked]),
        "overall_by_question_type": _percent(
            [accuracy(by_type[q.question_type], q) for q in asked]
        ),
    }


def _percent(values: Sequence[float]) -> float:
    return round(100 * float(sum(values)) / len(values), _DIGITS)


def _by(values: Sequence[float], kinds: Iterable[str | None]) -> dict[str, float]:
    """Means of the values of each kind; a kind of None is left out."""
    parts: dict[str, list[float]] = {}
    for value, kind in zip(values, kinds, strict=True):
        if kind is not None:
            parts.setdefault(kind, []).append(value)
    return {kind: _percent(part) for kind, part in parts.items()}


def _rounded(figures: dict[str, float]) -> dict[str, float]:
    return {name: round(value, _DIGITS) for name, value in figures.items()}


def main(argv: Sequence[str]) -> int:
    """Score files and print JSON; returns the exit code. Raises UserError."""
    parser = argparse.ArgumentParser(prog="python -m engine.metrics.vqa", description=__doc__)
    for name, form in vqa_files.FORMS.items():
        parser.add_argument(f"--{name}", type=Path, required=name != "questions", help=form)
    parser.add_argument("--per-question", action="store_true", help="print each question's, too")
    arguments = parser.parse_args(argv)
    found = vqa_files.read(arguments.annotations, arguments.results, arguments.questions)
    scores = score(found.questions, found.answers)
    told: dict[str, Any] = {"questions": len(found.questions)} | found.notes
    told |= scores.to_json()
    if arguments.per_question:
        told["evalQA"] = scores.per_question
    print(json.dumps(told, indent=1, ensure_ascii=False))
    for note in found.warnings():
        print(f"warning: {note}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(lambda: main(sys.argv[1:])))
