"""Questions about images and their annotators' answers, as VQA v2's (https://visualqa.org).

    <root>/v2_OpenEnded_mscoco_train2014_questions.json   {"questions": [
                                         {"question_id", "image_id", "question"}, …]}
    <root>/v2_mscoco_train2014_annotations.json           {"annotations": [
                                         {"question_id", "question_type", "answer_type",
                                          "answers": [{"answer"}, …]}, …]}
    <root>/train2014/COCO_train2014_000000000042.jpg

Either file may be packed (``.json.gz``). One row is one question.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from engine.config.schema import Section
from engine.data.tables.json_rows import read_list
from engine.data.tables.paths import annotation_file, image_folder
from engine.data.tables.source import TableSource, open_rows
from engine.data.tables.table import file_named, row_or_fault
from engine.data.tables.values import (
    answers,
    identity,
    image_names,
    mapping,
    optional_text,
    question_caption,
    required,
    string,
)
from engine.errors import UserError
from engine.types import BadSample, Row

_PATTERN = re.compile(r"[^%]*%(?:0?\d{1,2})?([ds])[^%]*")


class Config(Section):
    """Options of ``format: vqa``; files and folders are relative to ``root``."""

    root: Path  # relative to data.data_path; default: the dataset's name
    train_questions: str = "v2_OpenEnded_mscoco_train2014_questions.json"
    valid_questions: str = "v2_OpenEnded_mscoco_val2014_questions.json"
    train_annotations: str | None = "v2_mscoco_train2014_annotations.json"  # null: no answers
    valid_annotations: str | None = "v2_mscoco_val2014_annotations.json"
    train_images: str = "train2014"
    valid_images: str = "val2014"
    train_image_name: str = "COCO_train2014_%012d.jpg"  # the file of an image_id
    valid_image_name: str = "COCO_val2014_%012d.jpg"


def build(config: Config, *, name: str, split: str, cache_dir: Path) -> TableSource:
    """Open one split. Raises UserError, naming the path, for what is missing or malformed."""
    chosen = {
        option: getattr(config, f"{split}_{option}")
        for option in ("questions", "annotations", "images", "image_name")
    }
    pattern = chosen["image_name"]
    if not _PATTERN.fullmatch(pattern):
        raise UserError(
            f"{pattern!r} must hold the image_id's place once, as %012d, %d or %s",
            key=f"data.datasets.{name}.{split}_image_name",
        )
    inputs = [
        annotation_file(
            config.root,
            chosen[option],
            dataset=name,
            option=f"{split}_{option}",
            endings=(".json", ".json.gz"),
        )
        for option in ("questions", "annotations")
        if chosen[option] is not None
    ]
    images = image_folder(config.root, chosen["images"], dataset=name, option=f"{split}_images")
    options, rows = ("vqa", pattern), partial(_rows, inputs, pattern)
    return open_rows(name, split, inputs, options, rows, cache_dir=cache_dir, images=images)


def _rows(inputs: list[Path], pattern: str) -> Iterator[Row]:
    known = _annotations(inputs[1]) if len(inputs) > 1 else None
    for entry in read_list(inputs[0], "questions"):
        yield row_or_fault(f"question {entry.number}", _row, entry.value, known, pattern)


class _Annotation(NamedTuple):
    answers: tuple[str, ...] = ()
    question_type: str = ""
    answer_type: str = ""


def _annotations(path: Path) -> dict[str, _Annotation | BadSample]:
    """By question id. Raises UserError where a question has two that differ."""
    known: dict[str, _Annotation | BadSample] = {}
    shared: dict[str, str] = {}  # most answers are given thousands of times
    for entry in read_list(path, "annotations"):
        try:
            annotation = mapping(entry.value, "the annotation")
            own = identity(required(annotation, "question_id"), "the question_id")
        except BadSample:  # the question that it belongs to then has no answers
            continue
        try:
            given = tuple(shared.setdefault(answer, answer) for answer in _given(annotation))
            kinds = (optional_text(annotation, f"{of}_type") for of in ("question", "answer"))
            found: _Annotation | BadSample = _Annotation(
                given, *(kind and shared.setdefault(kind, kind) for kind in kinds)
            )
        except BadSample as bad:
            found = bad
        if own in known and (isinstance(found, BadSample) or known[own] != found):
            raise UserError(
                f"{path}, annotation {entry.number}: question {own[:60]!r} has other answers "
                "already"
            )
        known[own] = found
    return known


def _given(annotation: Any) -> tuple[str, ...]:
    if "answers" not in annotation and "multiple_choice_answer" in annotation:
        return (string(annotation["multiple_choice_answer"], "multiple_choice_answer"),)
    return answers(required(annotation, "answers"))


def _row(value: Any, known: dict[str, _Annotation | BadSample] | None, pattern: str) -> Row:
    asked = mapping(value, "the question")
    own = identity(required(asked, "question_id"), "the question_id")
    question = string(required(asked, "question"), "the question")
    image_id = identity(required(asked, "image_id"), "the image_id")
    found: _Annotation | BadSample = _Annotation()
    if known is not None:
        found = known.get(own, BadSample("no answer", f"question {own[:60]!r} is not annotated"))
    if isinstance(found, BadSample):
        raise found
    if known is not None and not found.answers:
        raise BadSample("no answer", f"question {own[:60]!r} has an empty list of answers")
    named = image_names(asked["image"]) if "image" in asked else (_file(pattern, image_id),)
    return Row(
        images=tuple(map(file_named, named)),
        caption=question_caption(question, found.answers),
        image_id=image_id,
        caption_id=own,
        question=question,
        answers=found.answers,
        question_type=found.question_type or optional_text(asked, "question_type"),
        answer_type=found.answer_type or optional_text(asked, "answer_type"),
    )


def _file(pattern: str, image_id: str) -> str:
    match = _PATTERN.fullmatch(pattern)
    if match is None or match[1] == "s":
        return pattern % image_id
    if not image_id.isdecimal() or len(image_id) > 20:
        detail = f"image_id {image_id[:60]!r} is not a number, as {pattern} wants"
        raise BadSample("malformed", detail)
    return pattern % int(image_id)
