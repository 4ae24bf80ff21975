"""What of a sample is written beside its image: members of a shard, or a row of a CSV."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from engine.data.tables.fields import most_common
from engine.types import Record, Turn

COLUMNS = (
    "image", "image_id", "caption", "caption_id", "question", "answers", "labels", "question_type",
    "answer_type", "source",
)  # fmt: skip
_LIST_MARK = "|"


def same_but_caption(one: Record, other: Record) -> bool:
    """Whether two rows of one image can be one sample with two captions."""
    texts = ("image_id", "label", "turns", "answers", "labels", "question_type", "answer_type")
    return all(getattr(one, name) == getattr(other, name) for name in texts)


def members(records: Sequence[Record]) -> tuple[str, str]:
    """The text and the JSON of a sample, whose rows differ in their captions alone.

    The text holds all captions, a line each; the JSON all that a row holds, so that nothing is
    lost. ``source`` is the name that the sample had.
    """
    first = records[0]
    fields: dict[str, Any] = {"source": first.key, "image_id": first.image_id}
    if len(records) == 1:
        fields |= {"caption_id": first.caption_id, "caption": first.caption}
    else:
        fields["caption_ids"] = [record.caption_id for record in records]
        fields["captions"] = [record.caption for record in records]
    if first.turns:
        fields["conversations"] = [{"from": who, "value": text} for who, text in first.turns]
    if first.answers:
        fields |= {"question": _question(first.turns), "answers": first.answers}
    for kind in ("question_type", "answer_type"):
        if getattr(first, kind):
            fields[kind] = getattr(first, kind)
    if first.labels:
        fields["labels"] = first.labels
    if first.label is not None:
        fields["label"] = first.label
    text = first.caption
    if len(records) > 1:
        text = "\n".join(" ".join(record.caption.splitlines()) for record in records)
    return text, json.dumps(fields, ensure_ascii=False)


def as_csv_has_it(record: Record) -> Record:
    """The record less what a CSV has no place for: a conversation of other turns than one question
    and its most common answer, names with the sign that joins lists, a class's number."""
    answers, turns = record.answers, record.turns
    asked = _question(turns)
    answered = (("human", asked), ("gpt", most_common(answers)))
    usual = (answered if answers else answered[:1]) if asked else ()
    if turns != usual or any(_LIST_MARK in answer for answer in answers):
        answers, turns = (), ()
    labels = tuple(label for label in record.labels if _LIST_MARK not in label)
    return replace(record, turns=turns, answers=answers, labels=labels, label=None)


def csv_row(image: str, record: Record) -> tuple[str, ...]:
    """Values of ``COLUMNS`` of what ``as_csv_has_it`` returned."""
    return (
        image,
        record.image_id,
        record.caption,
        record.caption_id,
        _question(record.turns),
        _LIST_MARK.join(record.answers),
        _LIST_MARK.join(record.labels),
        record.question_type,
        record.answer_type,
        record.key,
    )


def _question(turns: Sequence[Turn]) -> str:
    return next((text for who, text in turns if who == "human"), "")
