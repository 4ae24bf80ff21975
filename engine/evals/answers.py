"""Answers to questions about images: one beside the annotators', and which ones are allowed."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.config.schema import Generate
from engine.errors import UserError
from engine.evals.gallery import thumbnail
from engine.logs.gallery import Example
from engine.types import BadSample, Source

KEY = "generate.answers"


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer to a question, and those that annotators gave."""

    question_id: str
    image_id: str
    row: int  # of the source
    question: str
    answer: str
    references: tuple[str, ...]
    question_type: str = ""
    answer_type: str = ""
    probability: float | None = None  # among the answers that it was chosen from

    def to_json(self) -> dict[str, Any]:
        """A line of a predictions file; ``question_id`` and ``answer`` are the official form."""
        told: dict[str, Any] = {
            "question_id": self.question_id,
            "image_id": self.image_id,
            "question": self.question,
            "answer": self.answer,
        }
        if self.references:
            told["answers"] = list(self.references)
        if self.question_type:
            told["question_type"] = self.question_type
        if self.answer_type:
            told["answer_type"] = self.answer_type
        if self.probability is not None:
            told["probability"] = self.probability
        return told


def choices(section: Generate) -> list[str]:
    """The answers that ``generate.answers`` allows; none where all are. Raises UserError."""
    if section.method == "best_of_n":
        raise UserError(
            "best_of_n chooses captions; answers take greedy, beam or sample",
            key="generate.method",
        )
    given = section.answers
    if isinstance(given, str):
        given = _of_file(Path(given))
    elif given is None:
        return []
    found = list(dict.fromkeys(given))
    if len(found) < len(given) or not all(text.strip() for text in found) or not found:
        twice = next((text for text, times in Counter(given).items() if times > 1), None)
        what = "is empty" if not found else f"has {twice!r} twice" if twice else "has an empty one"
        raise UserError(f"the list of answers {what}", key=KEY)
    return found


def _of_file(path: Path) -> list[str]:
    """A JSON list of texts, or a text an answer a line."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        loaded = json.loads(text) if path.suffix == ".json" else text.splitlines()
    except FileNotFoundError as error:
        raise UserError(f"there is no file {path} of answers, one a line", key=KEY) from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}", key=KEY) from error
    if not isinstance(loaded, list) or not all(isinstance(one, str) for one in loaded):
        raise UserError(f"{path} is no JSON list of texts", key=KEY)
    return loaded


def shown(source: Source, answer: Answer, max_pixels: int) -> Example:
    """An answered question to look at: the annotators' answers, the commonest first."""
    try:
        images = source[answer.row].images
    except BadSample:
        images = ()
    own = [text for text, _ in Counter(answer.references).most_common()]
    return Example(
        thumbnail(images, max_pixels),
        own,
        [(answer.answer, answer.probability)],
        f"{answer.question} · {answer.image_id}",
    )
