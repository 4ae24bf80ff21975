"""Questions about drawn images in the forms that a user's own data has.

For a split: ``train_questions.csv`` (columns as of a VQA table), ``train_questions.json`` and
``train_annotations.json`` (VQA v2), ``train_conversations.json`` (LLaVA: all questions about an
image as one conversation); apart from these ``train_matches.csv``, whether captions are true, and
``train_pairs.csv`` (SugarCrepe's form: a true caption and one with a word changed).
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from engine.data.shapes.questions import Question

_ANNOTATORS = 10  # of a question, of one mind: the accuracy of VQA v2 asks for as many
_COLUMNS = (
    "image", "image_id", "question_id", "question", "answer_type", "question_type", "answers"
)  # fmt: skip
Asked = tuple[str, list[Question]]  # an image's name and what is asked about it


def write(folder: Path, split: str, images: Sequence[Asked]) -> None:
    """All files of a split; an image's number is its ``image_id``."""
    matches = [(name, [q for q in asked if q.kind == "match"]) for name, asked in images]
    _write_csv(folder / f"{split}_matches.csv", matches)
    images = [(name, [q for q in asked if q.kind != "match"]) for name, asked in images]
    _write_csv(folder / f"{split}_questions.csv", images)
    _write_json(folder / f"{split}_questions.json", {
        "task_type": "Open-Ended",
        "questions": [
            {"image_id": image, "question": asked.text, "question_id": number}
            for image, number, _, asked in _numbered(images)
        ],
    })  # fmt: skip
    _write_json(folder / f"{split}_annotations.json", {
        "annotations": [
            {
                "question_id": number,
                "image_id": image,
                "question_type": asked.kind,
                "answer_type": asked.answer_type,
                "multiple_choice_answer": asked.answer,
                "answers": [
                    {"answer": asked.answer, "answer_confidence": "yes", "answer_id": annotator}
                    for annotator in range(1, _ANNOTATORS + 1)
                ],
            }
            for image, number, _, asked in _numbered(images)
        ],
    })  # fmt: skip
    _write_json(folder / f"{split}_conversations.json", [
        {"id": Path(name).stem, "image": name, "conversations": _conversation(questions)}
        for name, questions in images
    ])  # fmt: skip


def write_pairs(path: Path, pairs: Sequence[tuple[str, str, str, str]]) -> None:
    """An image's name, its caption, that with one word changed, the kind of that word."""
    with path.open("w", newline="", encoding="utf8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("image", "caption", "negative_caption", "kind"))
        writer.writerows(pairs)


def _numbered(images: Sequence[Asked]) -> Iterator[tuple[int, int, str, Question]]:
    """Image id, question id, the image's name, the question."""
    for image, (name, questions) in enumerate(images):
        for place, asked in enumerate(questions):
            yield image, 10 * image + place, name, asked


def _write_csv(path: Path, images: Sequence[Asked]) -> None:
    with path.open("w", newline="", encoding="utf8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(_COLUMNS)
        for image, number, name, asked in _numbered(images):
            answers = "|".join([asked.answer] * _ANNOTATORS)
            writer.writerow(
                (name, image, number, asked.text, asked.answer_type, asked.kind, answers)
            )


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value) + "\n", encoding="utf8")


def _conversation(questions: Sequence[Question]) -> list[dict[str, str]]:
    turns = []
    for place, asked in enumerate(questions):
        text = asked.text if place else f"<image>\n{asked.text}"
        turns += [{"from": "human", "value": text}, {"from": "gpt", "value": asked.answer}]
    return turns
