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
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from sys import intern
from typing import Any

from engine.data.tables.json_rows import Entry, read_list, rows_of
from engine.data.tables.paths import FolderOptions, SplitFolder
from engine.data.tables.source import TableSource, open_rows
from engine.data.tables.table import file_named
from engine.data.tables.values import (
    answers,
    identity,
    image_names,
    optional_text,
    question_caption,
    required,
    string,
)
from engine.errors import UserError
from engine.types import BadSample, Row

_PATTERN = re.compile(r"[^%]*%(?:0?\d{1,2})?([ds])[^%]*")
_Annotation = tuple[tuple[str, ...], str, str]  # answers, question_type, answer_type


class Config(FolderOptions):
    """Options of ``format: vqa``; files and folders are relative to ``root``."""

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
    folder = SplitFolder(config, name, split)
    pattern = folder.of(config.train_image_name, config.valid_image_name)
    if not _PATTERN.fullmatch(pattern):
        what = f"has {pattern!r}, which must hold the image_id's place once, as %012d, %d or %s"
        raise folder.error(what, f"{split}_image_name")
    names = {
        "questions": folder.of(config.train_questions, config.valid_questions),
        "annotations": folder.of(config.train_annotations, config.valid_annotations),
    }
    inputs = [
        folder.file(file, option, ".json", ".json.gz")
        for option, file in names.items()
        if file is not None
    ]
    options, rows = ("vqa", pattern), partial(_rows, inputs, pattern)
    images = folder.images(folder.of(config.train_images, config.valid_images))
    return open_rows(name, split, inputs, options, rows, cache_dir=cache_dir, images=images)


def _rows(inputs: list[Path], pattern: str) -> Iterator[Row]:
    known = _annotations(inputs[1]) if len(inputs) > 1 else None
    return rows_of(read_list(inputs[0], "questions"), "question", _row, known, pattern)


def _annotations(path: Path) -> dict[str, _Annotation | BadSample]:
    """By question id. Raises UserError where a question has two that differ."""
    known: dict[str, _Annotation | BadSample] = {}
    for entry in read_list(path, "annotations"):
        try:
            annotation = entry.object("the annotation")
            own = identity(required(annotation, "question_id"), "the question_id")
        except BadSample:  # the question that it belongs to then has no answers
            continue
        found: _Annotation | BadSample
        try:
            found = (
                tuple(map(intern, _given(annotation))),  # most are given thousands of times
                intern(optional_text(annotation, "question_type")),
                intern(optional_text(annotation, "answer_type")),
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


def _given(annotation: Mapping[str, Any]) -> tuple[str, ...]:
    if "answers" not in annotation and "multiple_choice_answer" in annotation:
        return (string(annotation["multiple_choice_answer"], "multiple_choice_answer"),)
    return answers(required(annotation, "answers"))


def _row(entry: Entry, known: dict[str, _Annotation | BadSample] | None, pattern: str) -> Row:
    asked = entry.object("the question")
    own = identity(required(asked, "question_id"), "the question_id")
    question = string(required(asked, "question"), "the question")
    image_id = identity(required(asked, "image_id"), "the image_id")
    found: _Annotation | BadSample = ((), "", "")
    if known is not None:
        found = known.get(own, BadSample("no answer", f"question {own[:60]!r} is not annotated"))
    if isinstance(found, BadSample):
        raise found
    given, question_type, answer_type = found
    if known is not None and not given:
        raise BadSample("no answer", f"question {own[:60]!r} has an empty list of answers")
    named = image_names(asked["image"]) if "image" in asked else (_file(pattern, image_id),)
    return Row(
        images=tuple(map(file_named, named)),
        caption=question_caption(question, given),
        image_id=image_id,
        caption_id=own,
        question=question,
        answers=given,
        question_type=question_type or optional_text(asked, "question_type"),
        answer_type=answer_type or optional_text(asked, "answer_type"),
    )


def _file(pattern: str, image_id: str) -> str:
    match = _PATTERN.fullmatch(pattern)
    if match is None or match[1] == "s":
        return pattern % image_id
    if not image_id.isdecimal() or len(image_id) > 20:
        detail = f"image_id {image_id[:60]!r} is not a number, as {pattern} wants"
        raise BadSample("malformed", detail)
    return pattern % int(image_id)
