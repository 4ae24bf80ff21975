"""Captions: a decoder that speaks about what an image encoder has seen.

A batch holds prompt and caption as one text: the start token, the prompt, the caption, its end.
``labels_BT`` at t is the token after position t, and counts from the caption's first token on.
"""

from __future__ import annotations

from torch import Tensor

from engine.config.schema import Config
from engine.data.batch_memory import places, stack_images
from engine.data.text.tokenizer import TextTokenizer, clean
from engine.errors import UserError
from engine.tasks.language import LanguageTask, Tokens
from engine.types import BadSample, Batch, Row, Sample


class CaptionTask(LanguageTask):
    """Texts after images, learned token by token."""

    modalities = ("image", "caption")
    decoders = ("causal", "t5_cross")
    other_task = "; t5 reads questions: --task=vqa"

    def __init__(self, config: Config, tokenizer: TextTokenizer) -> None:
        super().__init__(config, tokenizer)
        prompt = config.data.prompt
        for unused in ("head", "tail"):
            if self.template.has(unused):
                raise UserError(
                    f"the prompt template {prompt.template!r} cuts captions ({{{unused}}}), which "
                    "--task=vqa does",
                    key="data.prompt.template",
                )
        if prompt.tokenize != "clean":
            raise UserError(
                f"tokenize: {prompt.tokenize} is for texts with images in their midst (--task=vqa)",
                key="data.prompt.tokenize",
            )
        longest = len(self._prompt_ids(prompt.instruction)) + 2  # start and one token
        if longest > self.max_length:
            raise UserError(
                f"the prompt takes {longest - 2} tokens and leaves none for a caption within "
                f"{self.max_length}; shorten data.prompt or raise model.decoder.max_length",
                key="model.decoder.max_length",
            )

    def batch(self, samples: list[Sample]) -> Batch:
        """Collate: uint8 ``image_BCHW``; ids, mask and labels padded to the longest text."""
        texts = self.as_one_text([self._tokens(sample) for sample in samples])
        return texts | {"image_BCHW": stack_images(samples)} | places(samples)

    def _tokens(self, sample: Sample) -> Tokens:
        """A caption that is too long loses its last tokens, but not its end."""
        before, after = self._halves(sample.row)
        return before, [*after[: max(0, self.max_length - len(before))], self.eos_id]

    def _halves(self, row: Row) -> Tokens:
        """Ids of the start and the prompt, and of the text to learn without its end."""
        prompt, caption = self.pair(row)
        after = self.tokenizer.raw(clean(caption))
        return [self.start_id, *self._prompt_ids(prompt)], after

    def usable(self, row: Row) -> None:
        """Raises BadSample where no token of the caption could be learned."""
        before, after = self._halves(row)
        if not after:
            raise BadSample("no caption", "it has no tokens")
        if len(before) >= self.max_length:
            raise BadSample(
                "prompt too long",
                f"{len(before)} of model.decoder.max_length {self.max_length} tokens",
            )

    def pair(self, row: Row) -> tuple[str, str]:
        """(instruction or question, the text to learn) of a row."""
        for (role, said), (next_role, answer) in zip(row.turns, row.turns[1:], strict=False):
            if (role, next_role) == ("human", "gpt"):
                return said.replace("<image>", "").strip(), answer
        return self.config.data.prompt.instruction, row.caption

    def describe(self, sample: Sample) -> tuple[str, str]:
        """A sample's prompt, and the text that is learned after it."""
        prompt, caption = self.pair(sample.row)
        return self.template.alone(prompt), clean(caption)

    def _prompt_ids(self, instruction: str) -> list[int]:
        return self.tokenizer.raw(self.template.alone(instruction))

    def prompts(self, instructions: list[str]) -> tuple[Tensor, Tensor]:
        """Ids and mask of prompts to be continued, int64 [B, P], padded on the left."""
        rows = [[self.start_id, *self._prompt_ids(one)] for one in instructions]
        return self.padded(rows, left=True)

    def room(self, ids_BP: Tensor) -> int:
        """New tokens that fit behind prompts."""
        return self.max_length - ids_BP.shape[1]


build = CaptionTask
