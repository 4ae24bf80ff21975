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
from dataclasses import dataclass, replace
from typing import Any

from engine.data.tables.table import texts_of
from engine.data.tables.values import (
    answers,
    conversation,
    first_answer,
    identity,
    most_common,
    optional_id,
    optional_text,
    question_caption,
    string,
    strings,
)
from engine.types import BadSample, Row, Turn

_MARKS = re.compile(rb'"(?:captions|caption_ids?|image_id|conversations|question|labels?)"')
_CAPTIONS = ("caption", "text", "title")


@dataclass(frozen=True, slots=True)
class TextForm:
    """Where captions are: in members of that ending, or else in that field of the JSON."""

    text: str = "txt"
    caption: str | None = None


def read_texts(text: bytes | None, fields: bytes | None, form: TextForm) -> list[Row]:
    """The rows of one sample, from the bytes of its text and JSON members; at least one.

    A row's caption is the text member; without one, the JSON's; without that, the first answer of
    its conversation, or the question with its answer. Raises BadSample: not text, corrupt,
    malformed, no caption.
    """
    plain = None if text is None else decoded(text, form.text)
    if fields is None or not needs_fields(plain, fields, form):
        return [Row(caption=_whole(plain))]
    entry = _object(fields)
    turns = _turns(entry)
    captions = list(_captions(entry, plain, form, turns))
    ids = entry.get("caption_ids")
    if isinstance(ids, list) and len(ids) == len(captions):
        ids = [identity(value, "a caption_id") for value in ids]
    else:
        ids = [optional_id(entry, "caption_id")] if len(captions) == 1 else [""] * len(captions)
    labels, label = entry.get("labels"), entry.get("label")
    labels = labels.split("|") if isinstance(labels, str) else strings(labels, "labels")
    if not isinstance(label, int) or isinstance(label, bool) or abs(label) >= 1 << 63:
        label = None
    shared = Row(
        image_id=optional_id(entry, "image_id"),
        label=label,
        turns=turns,
        answers=tuple(filter(None, answers(entry.get("answers")))),
        labels=tuple(filter(None, labels)),
        question_type=optional_text(entry, "question_type"),
        answer_type=optional_text(entry, "answer_type"),
    )
    rows = [
        replace(shared, caption=_whole(caption), caption_id=caption_id)
        for caption, caption_id in zip(captions, ids, strict=True)
    ]
    try:
        "".join(text for row in rows for text in texts_of(row)).encode()
    except UnicodeEncodeError:  # halves of surrogate pairs, which JSON can spell
        raise BadSample("not text", "its .json spells half a character") from None
    return rows or [Row(caption=_whole(None))]


def needs_fields(caption: str | None, fields: bytes, form: TextForm) -> bool:
    """Whether a JSON member must be parsed: img2dataset's has nothing that its text has not."""
    if not caption or form.caption is not None:
        return True
    return _MARKS.search(fields) is not None


def decoded(content: bytes, what: str) -> str:
    """UTF-8 text without a byte order mark or spaces around it. Raises BadSample: not text."""
    try:
        text = content.decode().strip()
        return text[1:].strip() if text[:1] == "\ufeff" else text
    except UnicodeDecodeError as error:
        detail = f"byte {error.start} of its .{what} is 0x{content[error.start]:02x}: not UTF-8"
        raise BadSample("not text", detail) from None


def _whole(caption: str | None) -> str:
    if caption is None or not caption.strip():
        raise BadSample("no caption", "it has no text" if caption is None else "its text is empty")
    return caption


def _object(content: bytes) -> dict[str, Any]:
    try:
        entry = json.loads(decoded(content, "json"))
    except (ValueError, RecursionError) as error:
        raise BadSample("corrupt", f"its .json is not JSON: {error}") from None
    if not isinstance(entry, dict):
        raise BadSample("corrupt", f"its .json holds a {type(entry).__name__}, not an object")
    return entry


def _captions(
    entry: dict[str, Any], plain: str | None, form: TextForm, turns: tuple[Turn, ...]
) -> Iterable[str]:
    if form.caption is not None:
        return strings(entry.get(form.caption), form.caption)
    if entry.get("captions"):
        return strings(entry["captions"], "captions")
    name = next((name for name in _CAPTIONS if entry.get(name)), "")
    own = entry[name] if name else None
    # The same text in both: the JSON's has the spaces that its writer was given.
    if plain and not (isinstance(own, str) and own.strip() == plain):
        return (plain,)
    if name:
        return strings(own, name)
    if "conversations" in entry:
        return (first_answer(turns),)
    if turns:
        return (question_caption(turns[0][1], [text for _, text in turns[1:]]),)
    return () if plain is None else (plain,)


def _turns(entry: dict[str, Any]) -> tuple[Turn, ...]:
    """The conversation; of a question, it and its answer, or the one that most annotators gave."""
    if entry.get("conversations"):
        return conversation(entry["conversations"])
    if not entry.get("question"):
        return ()
    own = strings(entry.get("answer"), "answer") or (most_common(answers(entry.get("answers"))),)
    return ("human", string(entry["question"], "the question")), ("gpt", own[0])
