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

from pydantic import ValidationError

from engine.config.explain import explain
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


class TemplateText(Section):
    """A template as a file has it."""

    input: str
    target: str = "{answer}"
    system: str = ""
    after: str = " "
    image: str = f"{MARK}\n"


class Template(TemplateText):
    """One template; ``instruction`` is that of ``data.prompt``."""

    instruction: str = ""

    def has(self, field: str) -> bool:
        """Whether the prompt or what is learned asks for ``field``."""
        return f"{{{field}}}" in self.input + self.target

    def prompt(self, one: Row | Sample, *, marks: bool = True) -> str:
        """All that precedes a sample's last answer, earlier turns of a conversation included.

        Each of its images is a mark, or without ``marks`` nothing. Raises BadSample where the marks
        in the sample's texts are not as many as its images, or where turns do not alternate.
        """
        row = row_of(one)
        turns, given = _asked(row.turns), len(row.images)
        _check_marks(turns, given)
        if not turns or not self.has("question"):
            turns = [("human", "" if self.has("instruction") else self.instruction)]
        return self._conversation(turns, given, marks, _cut(one)[0])

    def question(self, question: str, num_images: int = 1, *, marks: bool = True) -> str:
        """The prompt of one question, as ``prompt``."""
        turn = ("human", question)
        _check_marks([turn], num_images)
        return self._conversation([turn], num_images, marks)

    def learned(self, one: Row | Sample) -> str:
        """What is learned of a sample: its last answer, its caption or a part of that."""
        answers = [text for role, text in row_of(one).turns if role == "gpt"]
        caption = clean(row_of(one).caption)
        values = {"answer": answers[-1].strip() if answers else caption, "caption": caption}
        return _fill(self.target, values | {"tail": _cut(one)[1]})

    def alone(self, instruction: str) -> str:
        """The prompt of an instruction, without images."""
        return self.system + _fill(self.input, {"instruction": instruction})

    def _conversation(
        self, turns: Sequence[Turn], num_images: int, marks: bool, head: str = ""
    ) -> str:
        prompt, instruction = self.system, self.instruction
        waiting = 0 if self.has("question") and _count_marks(turns) else num_images
        for role, text in turns:
            if role == "gpt":
                prompt += _without_marks(text) + self.after
                continue
            own = text.count(MARK)
            if own == 1 or not marks:
                text = _without_marks(text)
            images = self.image * ((own == 1) + waiting) if marks else ""
            values = {"images": images, "instruction": instruction, "question": text.strip()}
            prompt += "" if self.has("images") else images
            prompt += _fill(self.input, values | {"head": head})
            instruction, waiting = "", 0
        return prompt


def row_of(one: Row | Sample) -> Row:
    """The row of a sample."""
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


def _check_marks(turns: Sequence[Turn], num_images: int) -> None:
    """Raises BadSample where the texts have marks, but not as many as there are images."""
    count = _count_marks(turns)
    if count not in (0, num_images):
        hint = "; of a list, several_images: all takes every one" if count > num_images == 1 else ""
        raise BadSample("image count", f"{count} {MARK} in the text, {num_images} given{hint}")


def _without_marks(text: str) -> str:
    return text.replace(MARK, "").strip()


def _cut(one: Row | Sample) -> tuple[str, str]:
    """A sample's caption in two, neither of them empty, at a character of any place in it.

    A row, for which nothing is drawn, is not cut; a sample in evaluation always in its middle.
    """
    caption = clean(row_of(one).caption)
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
    known = templates(_OWN, key)
    if file.endswith((".yaml", ".yml")):
        found = _of_file(Path(file), chosen, key)
    elif name in known:
        found = known[name]
    elif "{" in name:
        found = Template(input=name)
        _check(f"the prompt template {name!r}", found, key)
    else:
        raise UserError(
            f"no prompt template is called {name!r}; {nearest(name, list(known))}, name a YAML "
            "file, or write one out with {instruction} or {question} in it",
            key=key,
        )
    return found.model_copy(update={"instruction": instruction})


def _of_file(path: Path, chosen: str, key: str) -> Template:
    found = templates(path, key)
    if chosen not in found and (chosen or len(found) != 1):
        wanted = f"none is called {chosen!r}" if chosen else "none is chosen"
        raise UserError(
            f"{path} holds {len(found)} templates and {wanted}; name one as {path}#NAME: "
            + ", ".join(found),
            key=key,
        )
    return found[chosen] if chosen else next(iter(found.values()))


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
    found = {}
    for name, values in raw.items():
        what = f"{path}: the prompt template {name!r}"
        try:
            checked = TemplateText.model_validate(values)
        except ValidationError as error:
            wrong = explain(error.errors(include_url=False), values, TemplateText)
            listed = "; ".join(f"{'.'.join(path)}: {message}" for path, message in wrong.items())
            raise UserError(f"{what}: {listed}", key=key) from error
        found[name] = Template(**checked.model_dump())
        _check(what, found[name], key)
    return found


def _check(what: str, found: Template, key: str) -> None:
    """Raises UserError for an unknown field."""
    for where, known in _FIELDS.items():
        for field in re.findall(r"\{([^{}]*)\}", getattr(found, where)):
            if field not in known:
                listed = ", ".join(f"{{{name}}}" for name in known)
                raise UserError(
                    f"{what} has the field {{{field}}}; fields of {where} are {listed}", key=key
                )
    for where in ("system", "after", "image"):
        if (stray := _FIELD.search(getattr(found, where))) is not None:
            raise UserError(f"{what} has {stray[0]} in {where}, which takes no fields", key=key)
