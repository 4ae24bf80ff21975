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

import csv
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
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
_ASKED = ("image", "image_id", "question_id", "question", "answer_type", "question_type", "answers")
_COLUMNS = {
    "anno": ("image", "image_id", "caption", "caption_id"),
    "labels": ("image", "labels"),
    "pairs": ("image", "caption", "negative_caption", "kind"),
    "questions": _ASKED,
    "matches": _ASKED,
}


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
        key = [options.seed, list(PHRASINGS).index(options.style), number]
        tables: dict[str, list[tuple[object, ...]]] = {name: [] for name in _COLUMNS}
        talks: list[dict[str, Any]] = []
        for i, (scene, phrasing) in enumerate(scenes(options, np.random.default_rng(key))):
            name, text = f"{i:06d}.jpg", caption(scene, options.style, phrasing)
            rng = np.random.default_rng([*key, 1 + i])
            image = draw(scene, options.style, options.image_size, rng)
            # Without chroma subsampling: at 64 pixels it would blend neighbouring colours.
            image.save(folder / split / name, quality=90, subsampling=0)
            tables["anno"].append((name, i, text, i))
            if options.labels:
                shown = (f"{group.colour} {group.shape}" for group in (scene.first, scene.second))
                tables["labels"].append((name, "|".join(dict.fromkeys(shown))))
            if options.questions:
                rng = np.random.default_rng([*key, 1 + i, 1])
                asked = ask(scene, options.style, rng)
                tables["pairs"].append((name, text, *one_word_changed(text, rng)))
                matches = [each for each in asked if each.kind == "match"]
                others = [each for each in asked if each.kind != "match"]
                tables["matches"] += _rows(name, i, matches)
                tables["questions"] += _rows(name, i, others)
                talks.append({"id": f"{i:06d}", "image": name, "conversations": _talk(others)})
        for table, rows in tables.items():
            if rows:
                _write_csv(folder / f"{split}_{table}.csv", _COLUMNS[table], rows)
        if talks:
            _write_json(folder / f"{split}_conversations.json", talks)
            _write_vqa(
                folder, split, [dict(zip(_ASKED, row, strict=True)) for row in tables["questions"]]
            )
    used = asdict(options)
    for extra in ("questions", "labels"):
        if not used[extra]:
            del used[extra]
    _write_json(folder / OPTIONS_FILE, used)


def _training(options: Options, rng: np.random.Generator) -> Iterator[tuple[Scene, int]]:
    for scene in islice(training_scenes(rng), options.num_train):
        yield scene, int(rng.integers(num_phrasings(options.style)))


def _held_out(options: Options, rng: np.random.Generator) -> Iterator[tuple[Scene, int]]:
    """Whole families, each in one phrasing, so that words alone do not tell its scenes apart."""
    left = options.num_valid
    for family in held_out_families(rng)[: -(-options.num_valid // FAMILY_SIZE)]:
        phrasing = int(rng.integers(num_phrasings(options.style)))
        yield from ((scene, phrasing) for scene in family[:left])
        left -= FAMILY_SIZE


def _rows(name: str, image: int, asked: list[Question]) -> Iterator[tuple[object, ...]]:
    for place, each in enumerate(asked):
        answers = "|".join([each.answer] * _ANNOTATORS)
        yield name, image, 10 * image + place, each.text, each.answer_type, each.kind, answers


def _talk(asked: list[Question]) -> list[dict[str, str]]:
    turns = []
    for place, each in enumerate(asked):
        text = each.text if place else f"<image>\n{each.text}"
        turns += [{"from": "human", "value": text}, {"from": "gpt", "value": each.answer}]
    return turns


def _write_vqa(folder: Path, split: str, rows: list[dict[str, Any]]) -> None:
    """The two files of VQA v2."""
    questions, annotations = [], []
    for row in rows:
        questions.append({key: row[key] for key in ("image_id", "question", "question_id")})
        answers = row["answers"].split("|")
        annotations.append({
            "question_id": row["question_id"],
            "image_id": row["image_id"],
            "question_type": row["question_type"],
            "answer_type": row["answer_type"],
            "multiple_choice_answer": answers[0],
            "answers": [
                {"answer": answer, "answer_confidence": "yes", "answer_id": annotator}
                for annotator, answer in enumerate(answers, 1)
            ],
        })  # fmt: skip
    questions_file = {"task_type": "Open-Ended", "questions": questions}
    _write_json(folder / f"{split}_questions.json", questions_file)
    _write_json(folder / f"{split}_annotations.json", {"annotations": annotations})


def _write_csv(path: Path, columns: tuple[str, ...], rows: list[tuple[object, ...]]) -> None:
    with path.open("w", newline="", encoding="utf8") as file:
        csv.writer(file, lineterminator="\n").writerows([columns, *rows])


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value) + "\n", encoding="utf8")
