"""What a sample's text and JSON members say: captions, ids, conversations, answers, labels.

The JSON may hold, each where it applies: ``caption`` (or ``captions``, a list: a row for each),
``image_id``, ``caption_id`` (or ``caption_ids``), ``conversations`` as LLaVA has them, ``question``
with ``answer`` or ``answers``, ``question_type`` and ``answer_type`` as VQA has them, ``labels``,
and ``label``, the number of a class. Everything else is left alone, among it what img2dataset
records of a download.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from engine.data.tables.fields import (
    answers,
    conversation,
    first_answer,
    identity,
    most_common,
    question_caption,
    string,
    strings,
)
from engine.types import BadSample, Turn

_MARKS = re.compile(rb'"(?:captions|caption_ids?|image_id|conversations|question|labels?)"')
_CAPTIONS = ("caption", "text", "title")


@dataclass(frozen=True, slots=True)
class TextForm:
    """Where captions are: in members of that ending, or else in that field of the JSON."""

    text: str = "txt"
    caption: str | None = None


class Text(NamedTuple):
    """The text of one row; ids are empty where the sample gives none."""

    caption: str
    image_id: str = ""
    caption_id: str = ""
    turns: tuple[Turn, ...] = ()
    answers: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    label: int | None = None
    question_type: str = ""
    answer_type: str = ""


def read_texts(text: bytes | None, fields: bytes | None, form: TextForm) -> list[Text]:
    """The rows of one sample, from the bytes of its text and JSON members; at least one.

    A row's caption is the text member; without one, the JSON's; without that, the first answer of
    its conversation, or the question with its answer. Raises BadSample: not text, corrupt,
    malformed, no caption.
    """
    plain = None if text is None else decoded(text, form.text)
    if fields is None or not needs_fields(plain, fields, form):
        return [Text(_whole(plain))]
    told = _object(fields)
    turns, given = _turns(told), answers(told.get("answers"))
    captions = list(_captions(told, plain, form, turns))
    ids = told.get("caption_ids")
    if isinstance(ids, list) and len(ids) == len(captions):
        ids = [identity(value, "a caption_id") for value in ids]
    else:
        ids = [_id(told, "caption_id")] if len(captions) == 1 else [""] * len(captions)
    labels = told.get("labels")
    if isinstance(labels, str):
        labels = labels.split("|")
    label = told.get("label")
    if not isinstance(label, int) or isinstance(label, bool) or abs(label) >= 1 << 63:
        label = None
    asks, takes = _kind(told, "question_type"), _kind(told, "answer_type")
    shared = (turns, given, strings(labels, "labels"), label, asks, takes)
    rows = [
        Text(_whole(caption), _id(told, "image_id"), caption_id, *shared)
        for caption, caption_id in zip(captions, ids, strict=True)
    ]
    for row in rows:
        _check_text(row)
    return rows or [Text(_whole(None))]


def needs_fields(caption: str | None, fields: bytes, form: TextForm) -> bool:
    """Whether a JSON member must be parsed: img2dataset's tells nothing that its text does not."""
    if not caption or form.caption is not None:
        return True
    return _MARKS.search(fields) is not None


def decoded(content: bytes, what: str) -> str:
    """UTF-8 text without a byte order mark or spaces around it. Raises BadSample: not text."""
    try:
        text = content.decode().strip()
        return text[1:].strip() if text[:1] == "\ufeff" else text
    except UnicodeDecodeError as error:
        told = f"byte {error.start} of its .{what} is 0x{content[error.start]:02x}: no UTF-8"
        raise BadSample("not text", told) from None


def _whole(caption: str | None) -> str:
    if caption is None or not caption.strip():
        raise BadSample("no caption", "it has no text" if caption is None else "its text is empty")
    return caption


def _object(content: bytes) -> dict[str, Any]:
    try:
        told = json.loads(decoded(content, "json"))
    except (ValueError, RecursionError) as error:
        raise BadSample("corrupt", f"its .json is no JSON: {error}") from None
    if not isinstance(told, dict):
        raise BadSample("corrupt", f"its .json holds a {type(told).__name__}, not an object")
    return told


def _captions(
    told: dict[str, Any], plain: str | None, form: TextForm, turns: tuple[Turn, ...]
) -> Iterable[str]:
    if form.caption is not None:
        return strings(told.get(form.caption), form.caption)
    if told.get("captions"):
        return strings(told["captions"], "captions")
    own = next(((name, told[name]) for name in _CAPTIONS if told.get(name)), None)
    # The same text in both: the JSON's has the spaces that its writer was given.
    if plain and not (own and isinstance(own[1], str) and own[1].strip() == plain):
        return (plain,)
    if own:
        return strings(own[1], own[0])
    if "conversations" in told:
        return (first_answer(turns),)
    if turns:
        return (question_caption(turns[0][1], [said for _, said in turns[1:]]),)
    return () if plain is None else (plain,)


def _turns(told: dict[str, Any]) -> tuple[Turn, ...]:
    """The conversation; of a question, it and its answer, or the one that most annotators gave."""
    if told.get("conversations"):
        return conversation(told["conversations"])
    if not told.get("question"):
        return ()
    own = strings(told.get("answer"), "answer") or (most_common(answers(told.get("answers"))),)
    return ("human", string(told["question"], "the question")), ("gpt", own[0])


def _kind(told: dict[str, Any], name: str) -> str:
    return "" if told.get(name) is None else string(told[name], f"the {name}")


def _id(told: dict[str, Any], name: str) -> str:
    return "" if told.get(name) is None else identity(told[name], name)


def _check_text(row: Text) -> None:
    """Raises BadSample for halves of surrogate pairs, which JSON can spell and no text can hold."""
    spoken = [said for _, said in row.turns]
    try:
        kinds = row.question_type, row.answer_type
        "".join((*row[:3], *spoken, *row.answers, *row.labels, *kinds)).encode()
    except UnicodeEncodeError:
        raise BadSample("not text", "its .json spells half a character") from None
