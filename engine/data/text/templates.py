"""Prompt templates by name: what stands before a caption or an answer.

A template has the fields ``{instruction}`` and ``{question}``; a part in square brackets is left
out where its field is empty. The same text is used in training and in generation.
"""

from __future__ import annotations

import re

from engine.errors import UserError
from engine.registry import nearest

TEMPLATES = {
    "plain": "{instruction}",
    # GIT-LLM's forms
    "instruction_answer": "[##Instruction: {instruction} ][##Question: {question} ]##Answer: ",
    "human_gpt": "##human: [{instruction} ][{question} ]##gpt: ",
}
_PART = re.compile(r"\[([^\[\]]*)\]")
_FIELD = re.compile(r"\{(\w*)\}")
_FIELDS = ("instruction", "question")


def template(name: str, *, key: str) -> str:
    """The template called ``name``, or ``name`` itself where it has a field. Raises UserError."""
    text = TEMPLATES.get(name)
    if text is None and "{" not in name:
        raise UserError(
            f"no prompt template is called {name!r}; {nearest(name, list(TEMPLATES))}, or write "
            "one out with {instruction} or {question} in it",
            key=key,
        )
    text = name if text is None else text
    for field in re.findall(r"\{([^{}]*)\}", text):
        if field not in _FIELDS:
            raise UserError(
                f"the prompt template {name!r} has the field {{{field}}}; fields are "
                f"{' and '.join(f'{{{known}}}' for known in _FIELDS)}",
                key=key,
            )
    return text


def fill(text: str, *, instruction: str = "", question: str = "") -> str:
    """The prompt of one sample."""
    values = {"instruction": instruction, "question": question}

    def part(match: re.Match[str]) -> str:
        inside = match[1]
        return inside if all(values[field] for field in _FIELD.findall(inside)) else ""

    return _FIELD.sub(lambda match: values[match[1]], _PART.sub(part, text))
