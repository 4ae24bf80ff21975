"""Prompt templates: what precedes a caption or an answer, and what of a sample is learned.

Templates are data; ``templates.yaml`` describes their form. The same text is used in training,
evaluation and generation.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import PrivateAttr

from engine.config.explain import validate
from engine.config.section import Section
from engine.config.yaml_source import Fault, parse, plain
from engine.data.permutation import hash64
from engine.data.text.tokenizer import clean
from engine.errors import UserError
from engine.registry import nearest
from engine.types import BadSample, Row, Sample, Turn

MARK = "<image>"  # the place of an image in a text
_OWN = Path(__file__).with_suffix(".yaml")
_PART = re.compile(r"\[([^\[\]]*)\]")
_FIELD = re.compile(r"\{(\w*)\}")
_FIELDS = {
    "input": ("images", "instruction", "question", "head"),
    "target": ("answer", "caption", "tail"),
}


class Template(Section):
    """One template; its instruction is that of ``data.prompt``."""

    input: str
    target: str = "{answer}"
    system: str = ""
    after: str = " "
    image: str = f"{MARK}\n"
    _instruction: str = PrivateAttr("")

    def has(self, field: str) -> bool:
        """Whether the prompt or what is learned asks for ``field``."""
        return f"{{{field}}}" in self.input + self.target

    def prompt(self, one: Row | Sample, *, marks: bool = True) -> str:
        """All that precedes a sample's last answer, earlier turns of a conversation included.

        Each of its images is a mark, or without ``marks`` nothing. Raises BadSample where the marks
        in the sample's texts are not as many as its images, or where turns do not alternate.
        """
        row, (head, _) = _row_of(one), _cut(one)
        turns, num_images = _asked(row.turns), len(row.images)
        if (count := _count_marks(turns)) not in (0, num_images):
            hint = "; of a list, several_images: all takes every one" * (count > num_images == 1)
            raise BadSample("image count", f"{count} {MARK} in the text, {num_images} given{hint}")
        if not turns or not self.has("question"):
            turns = [("human", "" if self.has("instruction") else self._instruction)]
        prompt, instruction = self.system, self._instruction
        # images that no text has a place for come in front of the first turn
        unmarked = 0 if self.has("question") and _count_marks(turns) else num_images
        for role, text in turns:
            if role == "gpt":
                prompt += _without_marks(text) + self.after
                continue
            own = text.count(MARK)
            if own == 1 or not marks:
                text = _without_marks(text)
            images = self.image * ((own == 1) + unmarked) if marks else ""
            values = {"images": images, "instruction": instruction, "question": text.strip()}
            prompt += "" if self.has("images") else images
            prompt += _fill(self.input, values | {"head": head})
            instruction, unmarked = "", 0
        return prompt

    def question(self, question: str, num_images: int = 1, *, marks: bool = True) -> str:
        """The prompt of one question, as ``prompt``."""
        row = Row(images=(b"",) * num_images, turns=(("human", question),))
        return self.prompt(row, marks=marks)

    def learned(self, one: Row | Sample) -> str:
        """What is learned of a sample: its last answer, its caption or a part of that."""
        row = _row_of(one)
        answers, caption = [text for role, text in row.turns if role == "gpt"], clean(row.caption)
        values = {"answer": answers[-1].strip() if answers else caption, "caption": caption}
        return _fill(self.target, values | {"tail": _cut(one)[1]})

    def alone(self, instruction: str) -> str:
        """The prompt of an instruction, without images."""
        return self.system + _fill(self.input, {"instruction": instruction})


def _row_of(one: Row | Sample) -> Row:
    return one.row if isinstance(one, Sample) else one


def _asked(turns: Sequence[Turn]) -> Sequence[Turn]:
    """A conversation up to its last question. Raises BadSample where it is in another order."""
    for number, (role, _) in enumerate(turns):
        if role != ("human", "gpt")[number % 2]:
            before = f"after {turns[number - 1][0]}" if number else "first"
            raise BadSample("malformed", f"turn {number + 1}: {role} speaks {before}")
    return turns[: len(turns) - (len(turns) % 2 == 0)]


def _count_marks(turns: Sequence[Turn]) -> int:
    return sum(text.count(MARK) for role, text in turns if role == "human")


def _without_marks(text: str) -> str:
    return text.replace(MARK, "").strip()


def _cut(one: Row | Sample) -> tuple[str, str]:
    """A sample's caption in two, neither of them empty, at a character of any place in it.

    A row, for which nothing is drawn, is not cut; a sample in evaluation always in its middle.
    """
    caption = clean(_row_of(one).caption)
    places = len(caption) - 1
    if isinstance(one, Row) or places < 1:
        return "", caption
    place = 1 + (places // 2 if one.seed is None else hash64(one.seed, 2) % places)
    return caption[:place], caption[place:]


def _fill(text: str, values: dict[str, str]) -> str:
    def part(match: re.Match[str]) -> str:
        inside = match[1]
        return inside if all(values.get(field) for field in _FIELD.findall(inside)) else ""

    return _FIELD.sub(lambda match: values.get(match[1], ""), _PART.sub(part, text))


def template(name: str, *, key: str, instruction: str = "") -> Template:
    """The template of that name or file, or that consists of ``name``. Raises UserError at ``key``.

    A file is named ``FILE.yaml`` or, where it holds several, ``FILE.yaml#NAME``.
    """
    file, _, chosen = name.partition("#")
    is_file = file.endswith((".yaml", ".yml"))
    known = templates(Path(file) if is_file else _OWN, key)
    if is_file and not chosen and len(known) == 1:
        (found,) = known.values()
    elif is_file and chosen not in known:
        wanted = f"none is called {chosen!r}" if chosen else "none is chosen"
        raise UserError(
            f"{file} holds {len(known)} templates and {wanted}; name one as {file}#NAME: "
            + ", ".join(known),
            key=key,
        )
    elif is_file or name in known:
        found = known[chosen if is_file else name]
    elif "{" in name:
        found = _made(f"the prompt template {name!r}", {"input": name}, key)
    else:
        raise UserError(
            f"no prompt template is called {name!r}; {nearest(name, list(known))}, name a YAML "
            "file, or write one out with {instruction} or {question} in it",
            key=key,
        )
    found = found.model_copy()
    found._instruction = instruction
    return found


@cache
def templates(path: Path, key: str) -> dict[str, Template]:
    """The templates of a file by name. Raises UserError at ``key``, naming the file."""
    try:
        text = path.read_text(encoding="utf8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the prompt templates {path}: {error}", key=key) from error
    faults: list[Fault] = []
    root = parse(text, str(path), faults)
    if faults:
        raise UserError("\n".join(map(str, faults)), key=key)
    raw: Any = plain(root) if root else None
    if not isinstance(raw, dict) or not all(isinstance(value, dict) for value in raw.values()):
        raise UserError(f"{path} must hold templates, each NAME: {{input: …}}", key=key)
    return {
        name: _made(f"{path}: the prompt template {name!r}", values, key)
        for name, values in raw.items()
    }


def _made(what: str, values: dict[str, Any], key: str) -> Template:
    """Raises UserError for a wrong key, value or field."""
    found, wrong = validate(Template, values)
    if found is None:
        listed = "; ".join(f"{'.'.join(path)}: {message}" for path, message in wrong.items())
        raise UserError(f"{what}: {listed}", key=key)
    for where, text in found:
        known = _FIELDS.get(where)
        for field in re.findall(r"\{([^{}]*)\}" if known else r"\{(\w*)\}", text):
            if known is None:
                said = f"has {{{field}}} in {where}, which takes no fields"
            elif field not in known:
                listed = ", ".join(f"{{{name}}}" for name in known)
                said = f"has the field {{{field}}}; fields of {where} are {listed}"
            else:
                continue
            raise UserError(f"{what} {said}", key=key)
    return found
