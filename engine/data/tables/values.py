"""Values of annotation files, whatever they turn out to be, as the engine's own: ids, texts, turns.

Every function takes what a file holds and raises BadSample("malformed", …) where that is something
else than it should be.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from engine.errors import UserError
from engine.types import BadSample, Row, Turn

Several = Literal["first", "all", "refuse"]
"""What is taken of a sample with several images."""

_ROLES = {
    "human": "human", "user": "human",
    "gpt": "gpt", "assistant": "gpt", "chatgpt": "gpt", "model": "gpt",
}  # fmt: skip
_SHOWN = 60  # characters of a value in a message
_NUM_NAMED = 40  # columns in a message


def own_names(
    found: Sequence[str],
    names: Mapping[str, str],
    usual: Mapping[str, tuple[str, ...]],
    where: Path,
    required: Sequence[str] = (),
) -> dict[str, str]:
    """A file's own names of a table's columns: those in ``names``, else one of the ``usual`` ones.

    Raises UserError for a column that is missing although it is named or ``required``.
    """
    own = {}
    for column, listed in usual.items():
        # A column that the user gives one meaning has no other by its name, but the image's may be
        # its id.
        free = tuple(n for n in listed if column == "image" or n not in names.values())
        wanted = (names[column],) if column in names else free
        name = next((name for name in wanted if name in found), None)
        if name is not None:
            own[column] = name
        elif column in names or column in required:
            raise lacks(where, f"no column for the {column} ({' or '.join(wanted)})", found)
    return own


def lacks(where: Path, what: str, found: Sequence[str]) -> UserError:
    """The error of a file without a column that it should have, with those that it has."""
    more = ", …" if len(found) > _NUM_NAMED else ""
    there = ", ".join(found[:_NUM_NAMED]) or "none"
    return UserError(f"{where} has {what}; its columns are: {there}{more}")


def malformed(what: str, value: Any, wanted: str) -> BadSample:
    """The fault of a value that is not what is ``wanted``."""
    shown = repr(value) if not isinstance(value, list | dict) else f"a {type(value).__name__}"
    return BadSample("malformed", f"{what} is {shown[:_SHOWN]}, not {wanted}")


def required(row: Mapping[str, Any], name: str) -> Any:
    """The value of a key that must be there."""
    if name not in row:
        keys = ", ".join(sorted(map(str, row))) or "none"
        raise BadSample("malformed", f"no {name!r}; its keys: {keys}"[:300])
    return row[name]


def mapping(value: Any, what: str) -> Mapping[str, Any]:
    """A JSON object."""
    if not isinstance(value, dict):
        raise malformed(what, value, "an object")
    return value


def identity(value: Any, what: str) -> str:
    """An id, whether written as a string or as a whole number."""
    if isinstance(value, str):
        return value
    # Neither true, nor NaN, nor a number too long to be an id.
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 128:
        return str(value)
    raise malformed(what, value if not isinstance(value, int) else type(value), "an id")


def optional_id(row: Mapping[str, Any], name: str) -> str:
    """The id under a key; empty where the key is absent or null."""
    return "" if row.get(name) is None else identity(row[name], f"the {name}")


def optional_text(row: Mapping[str, Any], name: str) -> str:
    """The text under a key; empty where the key is absent or null."""
    return "" if row.get(name) is None else string(row[name], f"the {name}")


def string(value: Any, what: str) -> str:
    """A text."""
    if not isinstance(value, str):
        raise malformed(what, value, "a text")
    return value


def strings(value: Any, what: str) -> tuple[str, ...]:
    """One text or several; none of them where the value is null."""
    if value is None:
        return ()
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list | tuple):
        raise malformed(what, value, "a text or a list of texts")
    return tuple(string(item, what) for item in value)


def answers(value: Any, what: str = "answers") -> tuple[str, ...]:
    """Annotators' answers: a text, a list of texts, or VQA's list of ``{"answer": text}``."""
    if not isinstance(value, list):
        return strings(value, what)
    return tuple(
        string(required(item, "answer") if isinstance(item, dict) else item, what) for item in value
    )


def image_names(value: Any, which: Several = "first") -> tuple[str, ...]:
    """The names of a sample's images: null and an empty list mean none.

    Of several, the first alone where ``which`` is "first"; BadSample where it is "refuse".
    """
    names = chosen_images(strings(value, "image"), which)
    if not all(names):
        raise BadSample("missing", "the image's name is empty")
    return names


def chosen_images(images: tuple[Any, ...], which: Several) -> tuple[Any, ...]:
    """What ``several_images`` leaves of a sample's images. BadSample where that is "refuse"."""
    if len(images) > 1 and which == "refuse":
        raise BadSample(
            "several images", f"{len(images)}; several_images: first takes one, all takes every one"
        )
    return images if which == "all" else images[:1]


def conversation(value: Any) -> tuple[Turn, ...]:
    """Turns of ``{"from", "value"}`` (LLaVA) or ``{"role", "content"}``, their text unchanged.

    The speakers take turns; either may be the first.
    """
    if not isinstance(value, list):
        raise malformed("the conversation", value, "a list of turns")
    turns: list[Turn] = []
    for number, item in enumerate(value, 1):
        turn = mapping(item, f"turn {number}")
        named = "from" if "from" in turn else "role"
        speaker = string(required(turn, named), f"the speaker of turn {number}").lower()
        if speaker not in _ROLES:
            wanted = "one of " + ", ".join(_ROLES)
            raise malformed(f"the speaker of turn {number}", speaker, wanted)
        if turns and turns[-1][0] == _ROLES[speaker]:
            raise BadSample("malformed", f"turn {number} is {speaker}'s, as the one before it is")
        text = required(turn, "value" if named == "from" else "content")
        turns.append((_ROLES[speaker], string(text, f"turn {number}")))
    return tuple(turns)


def instruction(instruction: Any, inputs: Any, outputs: Any) -> tuple[Turn, ...]:
    """M3IT's instruction, its input on a line of its own, and the output, as two turns."""
    asked = [string(instruction, "instruction")]
    if inputs is not None and string(inputs, "inputs").strip():
        asked.append(inputs)
    return (("human", "\n".join(asked)), ("gpt", string(outputs, "outputs")))


def first_answer(turns: Iterable[Turn]) -> str:
    """The first text of ``gpt``; an empty one where it never speaks."""
    return next((text for role, text in turns if role == "gpt"), "")


def most_common(given: Iterable[str]) -> str:
    """The answer that most annotators gave, the earlier one of a tie."""
    counts = Counter(answer for answer in given if answer)
    return counts.most_common(1)[0][0] if counts else ""


def caption_of(row: Row) -> str:
    """The caption of a row that has none of its own."""
    if row.turns:
        return first_answer(row.turns)
    if row.question is not None:
        return question_caption(row.question, row.answers)
    return ", ".join(row.labels)


def question_caption(question: str, given: Iterable[str]) -> str:
    """A question and its most common answer as one text."""
    return f"{question} {most_common(given)}".strip() if question.strip() else ""
