"""Files of questions, annotations and results in the official forms of VQA v2."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.errors import UserError
from engine.metrics.json_files import entries, identity, kind, load, string
from engine.metrics.vqa_words import normalise

FORMS = {
    "questions": '{"questions": [{"question_id", "image_id", "question"}, …]}',
    "annotations": '{"annotations": [{"question_id", "answers": [{"answer"}, …], "answer_type", '
    '"question_type"}, …]}',
    "results": '[{"question_id", "answer"}, …]',
}
_YES_NO = frozenset({"yes", "no"})
_NUMBER = re.compile(r"\d[\d.:]*")


@dataclass(frozen=True, slots=True)
class Question:
    """What annotators answered to a question."""

    answers: tuple[str, ...]
    answer_type: str | None = None
    question_type: str | None = None
    main: str = ""  # the answer that most gave: it is found where none is told

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
        return self.main.lower() in _YES_NO


@dataclass(frozen=True, slots=True)
class Answered:
    """Annotated questions and answers to them, by id as text, in the files' order."""

    questions: dict[str, Question]
    answers: dict[str, str]
    notes: dict[str, int] = field(default_factory=dict)  # what does not match → how often

    def warnings(self) -> list[str]:
        """What was done about that which does not match."""
        done = {
            "unanswered": "annotated questions have no result and count as wrong",
            "unknown_results": "results answer no annotated question and are left out",
            "unasked": "annotated questions are not among the questions",
        }
        return [f"{count} {done[name]}" for name, count in self.notes.items() if count]


def read(annotations: Path, results: Path, questions: Path | None = None) -> Answered:
    """Annotated questions beside the answers given. Raises UserError naming file and entry.

    Ids may be numbers or texts, and packed files are unpacked. Questions are not needed to score:
    where given, they are held against the annotations.
    """
    asked = _annotations(annotations)
    said = _results(results)
    if not asked.keys() & said.keys():
        raise UserError(
            f"{results} answers none of the questions of {annotations}: its question ids are like "
            f"{next(iter(said))}, theirs like {next(iter(asked))}"
        )
    notes = {
        "unanswered": len(asked.keys() - said.keys()),
        "unknown_results": len(said.keys() - asked.keys()),
    }
    if questions is not None:
        known = _question_ids(questions)
        if not known & asked.keys():
            raise UserError(f"{annotations} annotates none of the questions of {questions}")
        notes["unasked"] = len(asked.keys() - known)
    return Answered(asked, said, notes)


def _annotations(path: Path) -> dict[str, Question]:
    form = FORMS["annotations"]
    found: dict[str, Question] = {}
    for place, entry in enumerate(_part(path, "annotations", form)):
        where = f"{path}: annotation {place}"
        key = identity(where, entry, "question_id", form)
        where += f" (question {key})"
        if key in found:
            raise UserError(f"{where} repeats its question")
        main = "multiple_choice_answer"
        found[key] = Question(
            _answers(where, entry.get("answers"), form),
            string(where, entry, "answer_type", form),
            string(where, entry, "question_type", form),
            string(where, entry, main, form) if main in entry else "",
        )
    return found


def _answers(where: str, value: Any, form: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not value:
        said = "an empty list" if value == [] else kind(value)
        raise UserError(f"{where}: answers is {said}; {form} is wanted")
    for number, entry in enumerate(value):
        if not isinstance(entry, dict):
            raise UserError(f"{where}: answer {number} is {kind(entry)}; {form} is wanted")
    return tuple(string(f"{where}: answer {n}", e, "answer", form) for n, e in enumerate(value))


def _results(path: Path) -> dict[str, str]:
    form = FORMS["results"]
    found: dict[str, str] = {}
    for place, entry in enumerate(entries(path, load(path), form, "results")):
        where = f"{path}: entry {place}"
        key = identity(where, entry, "question_id", form)
        answer = string(f"{where} (question {key})", entry, "answer", form)
        if found.setdefault(key, answer) != answer:
            raise UserError(f"{where} answers question {key} again, and otherwise than before")
    return found


def _question_ids(path: Path) -> set[str]:
    form = FORMS["questions"]
    return {
        identity(f"{path}: question {place}", entry, "question_id", form)
        for place, entry in enumerate(_part(path, "questions", form))
    }


def _part(path: Path, name: str, form: str) -> list[dict[str, Any]]:
    loaded = load(path)
    if not isinstance(loaded, dict) or name not in loaded:
        said = f'has no "{name}"' if isinstance(loaded, dict) else f"holds {kind(loaded)}"
        raise UserError(f"{path} {said}; {form} is wanted")
    return entries(path, loaded[name], form, name)
