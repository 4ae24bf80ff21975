"""Accuracy of answers to questions about images, in percent.

The accuracy of VQA v2 (Goyal et al. 2017), equal to that of its official evaluation; beside it
exact match, accuracy as GQA has it (Hudson and Manning 2019), figures of the questions of yes and
no, and what the most common answer would score. ``python -m engine.metrics.vqa`` scores files.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.errors import UserError, exit_code
from engine.metrics import pope
from engine.metrics.files import entries, filled, keyed, kind, load, section, string

_DIGITS = 2  # of a percentage, as the official evaluation rounds
_ENOUGH = 3  # annotators of one mind that make an answer wholly right
_NUMBER = re.compile(r"\d[\d.:]*")


@dataclass(frozen=True, slots=True)
class Question:
    """What annotators answered to a question."""

    answers: tuple[str, ...]
    answer_type: str | None = None
    question_type: str | None = None
    main: str = ""  # the answer that most gave; found from the answers by default

    def __post_init__(self) -> None:
        if not self.main and self.answers:
            commonest = Counter(map(normalise, self.answers)).most_common(1)[0][0]
            object.__setattr__(self, "main", commonest)

    @property
    def kind(self) -> str:
        """``answer_type``, or what the main answer looks like: yes/no, number or other.

        That is what the annotations say, too, for 98 of 100 questions of VQA v2.
        """
        if self.answer_type is not None:
            return self.answer_type
        return "yes/no" if self.is_binary else "number" if _NUMBER.fullmatch(self.main) else "other"

    @property
    def is_binary(self) -> bool:
        """Whether it is answered by yes or no."""
        return self.main.lower() in ("yes", "no")


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


def vqa_accuracy(answer: str, answers: Sequence[str]) -> float:
    """Official accuracy of one answer, 0 … 1: mean over all annotators but one of min(n / 3, 1).

    n is how many of them gave the answer. Answers are normalised only where annotators differ. Of
    fewer than four annotators, n may stay under 3 for any answer. Raises ValueError without any.
    """
    if not answers:
        raise ValueError("an answer is scored against annotators' answers; there are none")
    given, answer = [one_line(one) for one in answers], one_line(answer)
    if len(set(given)) > 1:
        given, answer = [normalise(one) for one in given], normalise(answer)
    hits = given.count(answer)
    # summed one by one, as the official evaluation does it: figures must round alike
    return sum(min(1.0, (hits - (one == answer)) / _ENOUGH) for one in given) / len(given)


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

    def accuracy(answer: str | None, question: Question) -> float:
        if answer is None:
            return 0.0
        if exact:
            return float(exact_match(answer, question.main))
        return vqa_accuracy(answer, question.answers)

    scored = list(questions.values())
    given = [answers.get(key) for key in questions]
    pairs = list(zip(given, scored, strict=True))
    accuracies = [accuracy(a, q) for a, q in pairs]
    binary = [(a, pope.means_yes(q.main)) for a, q in pairs if q.is_binary]
    right = [a is not None and gqa_match(a, q.main) for a, q in pairs]
    by_type: dict[str | None, list[str]] = defaultdict(list)
    for q in scored:
        by_type[q.question_type].append(q.main)
    commonest = _commonest(q.main for q in scored)
    of_type = {name: _commonest(mains) for name, mains in by_type.items()}
    return Scores(
        overall=_percent(accuracies),
        per_answer_type=_by(accuracies, (q.kind for q in scored)),
        per_question_type=_by(accuracies, (q.question_type for q in scored)),
        exact_match=_percent([a is not None and exact_match(a, q.main) for a, q in pairs]),
        gqa={"accuracy": _percent(right)}
        | _by(right, ("binary" if q.is_binary else "open" for q in scored)),
        yes_no=pope.rounded(pope.figures(*zip(*binary, strict=True))) if binary else {},
        majority={
            "answer": commonest,
            "overall": _percent([accuracy(commonest, q) for q in scored]),
            "overall_by_question_type": _percent(
                [accuracy(of_type[q.question_type], q) for q in scored]
            ),
        },
        per_question=dict(zip(questions, map(_percent, ([a] for a in accuracies)), strict=True)),
    )


def _commonest(answers: Iterable[str]) -> str:
    return Counter(answers).most_common(1)[0][0]


def _percent(values: Sequence[float]) -> float:
    return round(100 * float(sum(values)) / len(values), _DIGITS)


def _by(values: Sequence[float], kinds: Iterable[str | None]) -> dict[str, float]:
    """Means of the values of each kind; a kind of None is left out."""
    parts: dict[str, list[float]] = {}
    for value, name in zip(values, kinds, strict=True):
        if name is not None:
            parts.setdefault(name, []).append(value)
    return {name: _percent(part) for name, part in parts.items()}


# --- the form in which answers are compared
#
# The rules are those of the official VQA v2 evaluation (GT-Vision-Lab/VQA, vqaEval.py), with its
# quirks, because published figures depend on them: a comma between digits takes all punctuation out
# of the answer without a space in its place, a full stop goes unless a digit follows it, at most 32
# of them go, a word is a contraction only as it is spelled here, and "none" is zero.

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_FULL_STOP = re.compile(r"\.(?!\d)")
_MAX_FULL_STOPS = 32
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_ARTICLES = frozenset({"a", "an", "the"})
_NUMBERS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5",
    "six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip

# A word that lacks one of the apostrophes gets it back. Words like she'd, we'll and let's are not
# here: shed, well and lets are words of their own.
_CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've
might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
someone's something'd something'd've something'll that's there'd there'd've there're there's they'd
they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've
when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't
would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
_SPELLED = {
    word[:place] + word[place + 1 :]: word
    for word in _CONTRACTIONS.split()
    for place, letter in enumerate(word)
    if letter == "'"
} | {"somebody'd": "somebodyd"}  # the other way round, as the official table has it


def one_line(answer: str) -> str:
    """The answer with line ends and tabs as spaces, and none around it."""
    return answer.replace("\n", " ").replace("\t", " ").strip()


@functools.lru_cache(maxsize=1 << 16)  # most answers are given thousands of times
def normalise(answer: str) -> str:
    """Lower case, without punctuation and articles, numbers as digits, contractions spelled."""
    words = [_NUMBERS.get(word, word) for word in _punctuated(answer).lower().split()]
    return " ".join(_SPELLED.get(word, word) for word in words if word not in _ARTICLES)


def _punctuated(answer: str) -> str:
    """Without punctuation: in its place nothing beside a space, a space within a word."""
    text, in_number = answer, _COMMA_IN_NUMBER.search(answer) is not None
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in answer or f" {mark}" in answer
        text = text.replace(mark, "" if in_number or beside_space else " ")
    return _FULL_STOP.sub("", text, count=_MAX_FULL_STOPS)


# --- files

FORMS = {
    "questions": '{"questions": [{"question_id", "image_id", "question"}, …]}',
    "annotations": '{"annotations": [{"question_id", "answers": [{"answer"}, …], "answer_type", '
    '"question_type"}, …]}',
    "results": '[{"question_id", "answer"}, …]',
}
_NOTES = {
    "unanswered": "annotated questions have no result and count as wrong",
    "unknown_results": "results answer no annotated question and are left out",
    "unasked": "annotated questions are not among the questions",
}


@dataclass(frozen=True, slots=True)
class Answered:
    """Annotated questions and answers to them, by id as text, in the files' order."""

    questions: dict[str, Question]
    answers: dict[str, str]
    notes: dict[str, int] = field(default_factory=dict)  # what does not match → how often


def read(annotations: Path, results: Path, questions: Path | None = None) -> Answered:
    """Annotated questions beside the answers given. Raises UserError naming file and entry.

    Ids may be numbers or texts, and packed files are unpacked. Questions are not needed to score:
    where given, they are compared with the annotations.
    """
    annotated, answers = _annotations(annotations), _results(results)
    if not annotated.keys() & answers.keys():
        raise UserError(
            f"{results} answers none of the questions of {annotations}: its question ids are like "
            f"{next(iter(answers))}, theirs like {next(iter(annotated))}"
        )
    notes = {
        "unanswered": len(annotated.keys() - answers.keys()),
        "unknown_results": len(answers.keys() - annotated.keys()),
    }
    if questions is not None:
        form = FORMS["questions"]
        asked = section(questions, "questions", form, "questions")
        known = {key for _, key, _ in keyed(questions, asked, "question_id", form, "question")}
        if not known & annotated.keys():
            raise UserError(f"{annotations} annotates none of the questions of {questions}")
        notes["unasked"] = len(annotated.keys() - known)
    return Answered(annotated, answers, notes)


def _annotations(path: Path) -> dict[str, Question]:
    form = FORMS["annotations"]
    found: dict[str, Question] = {}
    annotated = section(path, "annotations", form, "annotations")
    for where, key, entry in keyed(path, annotated, "question_id", form, "annotation", unique=True):
        answers = []
        for number, answer in enumerate(filled(where, entry, "answers", form)):
            if not isinstance(answer, dict):
                raise UserError(f"{where}: answer {number} is {kind(answer)}; {form} is wanted")
            answers.append(string(f"{where}: answer {number}", answer, "answer", form))
        main = "multiple_choice_answer"
        found[key] = Question(
            tuple(answers),
            string(where, entry, "answer_type", form),
            string(where, entry, "question_type", form),
            string(where, entry, main, form) if main in entry else "",
        )
    return found


def _results(path: Path) -> dict[str, str]:
    form = FORMS["results"]
    found: dict[str, str] = {}
    given = entries(path, load(path), form, "results")
    for where, key, entry in keyed(path, given, "question_id", form):
        answer = string(where, entry, "answer", form)
        if found.setdefault(key, answer) != answer:
            raise UserError(f"{where} is answered again, differently from before")
    return found


def main(argv: Sequence[str]) -> int:
    """Score files and print JSON; returns the exit code. Raises UserError."""
    parser = argparse.ArgumentParser(prog="python -m engine.metrics.vqa", description=__doc__)
    for name, form in FORMS.items():
        parser.add_argument(f"--{name}", type=Path, required=name != "questions", help=form)
    parser.add_argument("--per-question", action="store_true", help="print each question's, too")
    arguments = parser.parse_args(argv)
    found = read(arguments.annotations, arguments.results, arguments.questions)
    scores = score(found.questions, found.answers)
    report = {  # the official evaluation's names, where it has one
        "questions": len(found.questions),
        **found.notes,
        "overall": scores.overall,
        "perAnswerType": scores.per_answer_type,
        "perQuestionType": scores.per_question_type,
        "exact_match": scores.exact_match,
        "gqa": scores.gqa,
        "yes_no": scores.yes_no,
        "majority": scores.majority,
    }
    if arguments.per_question:
        report["evalQA"] = scores.per_question
    print(json.dumps(report, indent=1, ensure_ascii=False))
    for name, count in found.notes.items():
        if count:
            print(f"warning: {count} {_NOTES[name]}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(lambda: main(sys.argv[1:])))
