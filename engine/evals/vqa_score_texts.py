"""What VQAScore asks of a text, and which texts cannot be asked about."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from engine.data.text.templates import template as find_template
from engine.errors import UserError
from engine.types import BadSample


class Asking:
    """A question, its answers and the template that both are put into.

    Args:
        task: of --task=vqa.
        question, answer: ``{}`` is the text's place, in either or in both.
        against: another answer, or None.
        template: its name; None: the task's own.

    Raises UserError for a question and an answer without the text, and for an unknown template.
    """

    def __init__(
        self, task: Any, question: str, answer: str, against: str | None, template: str | None
    ) -> None:
        if sorted(each.count("{}") for each in (question, answer)) not in ([0, 1], [1, 1]):
            told = f"{question!r}, {answer!r}"
            raise UserError(f"the question or the answer must have {{}} in it, once: {told}")
        self.task, self.question = task, question
        self.answers = [answer] if against is None else [answer, against]
        instruction = task.config.data.prompt.instruction
        self.template = (
            template and find_template(template, key="template", instruction=instruction)
        ) or None

    def asked(self, text: str) -> str:
        """The question about a text."""
        return self.question.replace("{}", text)

    def said(self, text: str) -> list[str]:
        """The answer, and that which it is held against."""
        return [each.replace("{}", text) for each in self.answers]

    def refused(self, texts: Sequence[str]) -> dict[str, BadSample]:
        """Of the texts those that the model cannot be asked about, and why."""
        found = {}
        for text in dict.fromkeys(texts):
            try:
                self._check(text)
            except BadSample as error:
                found[text] = BadSample(error.cause, f"{error.detail}: {text[:80]!r}")
        return found

    def _check(self, text: str) -> None:
        ids_1P = self.task.prompts([self.asked(text)], template=self.template)[0]
        longest = max(len(self.task.answer_ids(each)) for each in self.said(text))
        limit = self.task.max_length
        if ids_1P.shape[1] > limit or longest > self.task.room(ids_1P):
            raise BadSample(
                "prompt too long",
                f"{ids_1P.shape[1]} tokens, and {longest} of the answer, "
                f"model.decoder.max_length {limit}",
            )
