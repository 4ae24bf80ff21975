"""A drawn dataset, written once in the folder forms that a user's own data has.

    train/                     the images
    train_anno.csv             image, image_id, caption, caption_id
    train_labels.csv           labels: colour and shape of each kind of object, joined by ``|``
    train_questions.csv        questions, in the columns of a VQA table
    train_questions.json, train_annotations.json       the same questions as VQA v2 has its files
    train_conversations.json   all questions about an image as one conversation (LLaVA)
    train_matches.csv          questions whether a caption is true
    train_pairs.csv            a true caption and one with a word changed (SugarCrepe)

and the same of ``valid``. Labels and questions are written where the options ask for them.
"""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.tools.shapes.drawing import draw
from engine.tools.shapes.questions import Question, ask
from engine.tools.shapes.scenes import (
    FAMILY_SIZE,
    PHRASINGS,
    Scene,
    caption,
    held_out_families,
    num_phrasings,
    one_word_changed,
    training_scenes,
)

OPTIONS_FILE = "shapes.json"
_ANNOTATORS = 10  # of a question, all of one opinion: the accuracy of VQA v2 asks for as many
Asked = tuple[str, list[Question]]  # an image's name and what is asked about it


@dataclass(frozen=True, slots=True)
class Options:
    """What a drawn dataset is a pure function of."""

    style: str = "flat"
    seed: int = 0
    num_train: int = 6000
    num_valid: int = 600
    image_size: int = 64
    questions: bool = False  # beside the captions, which are the same
    labels: bool = False  # likewise


def read_options(folder: Path) -> Options | None:
    """What the dataset in ``folder`` was drawn with; None for a folder that was not drawn."""
    try:
        return Options(**json.loads((folder / OPTIONS_FILE).read_text(encoding="utf8")))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def write(folder: Path, options: Options) -> None:
    """Draw both splits into the empty ``folder``: images, texts, and the options used."""
    for number, (split, scenes) in enumerate((("train", _training), ("valid", _held_out))):
        (folder / split).mkdir()
        rows: list[tuple[str, int, str, int]] = []
        asked: list[Asked] = []
        pairs: list[tuple[str, str, str, str]] = []
        labels: list[tuple[str, str]] = []
        for i, (scene, phrasing) in enumerate(scenes(options)):
            name = f"{i:06d}.jpg"
            rng = np.random.default_rng([*_key(options, number), 1 + i])
            image = draw(scene, options.style, options.image_size, rng)
            # Without chroma subsampling: at 64 pixels it would blend neighbouring colours.
            image.save(folder / split / name, quality=90, subsampling=0)
            rows.append((name, i, caption(scene, options.style, phrasing), i))
            if options.labels:
                labels.append((name, "|".join(shown_objects(scene))))
            if options.questions:
                rng = np.random.default_rng([*_key(options, number), 1 + i, 1])
                asked.append((name, ask(scene, options.style, rng)))
                pairs.append((name, rows[-1][2], *one_word_changed(rows[-1][2], rng)))
        columns = ("image", "image_id", "caption", "caption_id")
        _write_csv(folder / f"{split}_anno.csv", columns, rows)
        if options.labels:
            _write_csv(folder / f"{split}_labels.csv", ("image", "labels"), labels)
        if options.questions:
            columns = ("image", "caption", "negative_caption", "kind")
            _write_csv(folder / f"{split}_pairs.csv", columns, pairs)
            _write_questions(folder, split, asked)
    used = asdict(options)
    for extra in ("questions", "labels"):
        if not used[extra]:
            del used[extra]
    _write_json(folder / OPTIONS_FILE, used)


def shown_objects(scene: Scene) -> list[str]:
    """Colour and shape of each kind of object, once: 'red circle', 'blue star'."""
    named = (f"{group.colour} {group.shape}" for group in (scene.first, scene.second))
    return list(dict.fromkeys(named))


def _key(options: Options, split: int) -> list[int]:
    return [options.seed, list(PHRASINGS).index(options.style), split]


def _training(options: Options) -> Iterator[tuple[Scene, int]]:
    rng = np.random.default_rng(_key(options, 0))
    for scene in itertools.islice(training_scenes(rng), options.num_train):
        yield scene, int(rng.integers(num_phrasings(options.style)))


def _held_out(options: Options) -> Iterator[tuple[Scene, int]]:
    """Whole families, each in one phrasing, so that words alone do not tell its scenes apart."""
    rng = np.random.default_rng(_key(options, 1))
    families = held_out_families(rng)[: -(-options.num_valid // FAMILY_SIZE)]
    phrased = [
        (scene, phrasing)
        for family in families
        for phrasing in (int(rng.integers(num_phrasings(options.style))),)
        for scene in family
    ]
    yield from phrased[: options.num_valid]


def _write_questions(folder: Path, split: str, images: Sequence[Asked]) -> None:
    """All files of a split's questions; an image's number is its ``image_id``."""
    matches = [(name, [q for q in asked if q.kind == "match"]) for name, asked in images]
    _write_question_table(folder / f"{split}_matches.csv", matches)
    images = [(name, [q for q in asked if q.kind != "match"]) for name, asked in images]
    _write_question_table(folder / f"{split}_questions.csv", images)
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


def _numbered(images: Sequence[Asked]) -> Iterator[tuple[int, int, str, Question]]:
    """Image id, question id, the image's name, the question."""
    for image, (name, questions) in enumerate(images):
        for place, asked in enumerate(questions):
            yield image, 10 * image + place, name, asked


def _write_question_table(path: Path, images: Sequence[Asked]) -> None:
    columns = ("image", "image_id", "question_id", "question", "answer_type", "question_type",
               "answers")  # fmt: skip
    rows = (
        (name, image, number, asked.text, asked.answer_type, asked.kind,
         "|".join([asked.answer] * _ANNOTATORS))
        for image, number, name, asked in _numbered(images)
    )  # fmt: skip
    _write_csv(path, columns, rows)


def _conversation(questions: Sequence[Question]) -> list[dict[str, str]]:
    turns = []
    for place, asked in enumerate(questions):
        text = asked.text if place else f"<image>\n{asked.text}"
        turns += [{"from": "human", "value": text}, {"from": "gpt", "value": asked.answer}]
    return turns


def _write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    with path.open("w", newline="", encoding="utf8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value) + "\n", encoding="utf8")
