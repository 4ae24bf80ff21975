"""Questions about images: a decoder that answers, having seen any number of images, or none.

With a decoder that encodes prompts (``t5``) a batch holds questions, with ``IMAGE_ID`` where images
stand, and in ``labels_BL`` the answers with their end. With one that continues a text
(``causal``) images come first, and question and answer are one text, of which the answer is
learned. Of a conversation the last answer is learned; all that comes before it is part of the
question (``data.conversations: flatten`` makes each question a row of its own).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.config.schema import Config
from engine.data.batch_memory import places, stack_images, stack_several
from engine.data.text.templates import MARK, Template
from engine.data.text.tokenizer import TextTokenizer
from engine.errors import UserError
from engine.losses.language_model import IGNORED
from engine.models.decoders import encodes_prompt
from engine.models.decoders.t5 import IMAGE_ID
from engine.tasks.language import LanguageTask, Tokens
from engine.types import BadSample, Batch, Row, Sample


class VqaTask(LanguageTask):
    """Answers to questions about images; with templates that learn captions, captions."""

    text_alone = True
    decoders = ("causal", "t5")
    other_task = "; t5_cross reads no questions: --task=caption"

    def __init__(self, config: Config, tokenizer: TextTokenizer) -> None:
        super().__init__(config, tokenizer)
        prompt, decoder = config.data.prompt, config.model.decoder.name
        self.encodes_prompt = encodes_prompt(decoder)
        self.ends_chunks = prompt.tokenize == "reference"
        asks = self.template.has("answer")
        self.modalities = ("image", "answer" if asks else "caption")
        if asks and not self.template.has("question"):
            raise UserError(
                f"the prompt template {prompt.template!r} asks no question; take vqa_plain, t5_v1, "
                "or one with {question} in it",
                key="data.prompt.template",
            )
        if self.ends_chunks and not self.encodes_prompt:
            raise UserError(
                f"tokenize: reference puts an end before each image, and decoder {decoder!r} has "
                "its images before the text; take clean",
                key="data.prompt.tokenize",
            )

    # --- samples to tensors

    def batch(self, samples: list[Sample]) -> Batch:
        """Collate: images, questions and answers."""
        pairs = [self._tokens(sample) for sample in samples]
        if not self.encodes_prompt:
            texts = self.as_one_text(pairs)
        else:
            ids_BT, mask_BT = self.padded([prompt for prompt, _ in pairs])
            answers, said_BL = self.padded([answer for _, answer in pairs])
            labels_BL = answers.masked_fill(said_BL == 0, IGNORED)
            texts = {"input_ids_BT": ids_BT, "attention_mask_BT": mask_BT, "labels_BL": labels_BL}
        return texts | self._images(samples) | places(samples)

    def prompt_batch(self, samples: list[Sample]) -> Batch:
        """Collate for answering: all that stands before each sample's last answer."""
        ids_BT, mask_BT = self.padded(
            [self._prompt_ids(self._prompt(sample)) for sample in samples],
            left=not self.encodes_prompt,
        )
        texts = {"input_ids_BT": ids_BT, "attention_mask_BT": mask_BT}
        return texts | self._images(samples) | places(samples)

    def _images(self, samples: list[Sample]) -> Batch:
        """uint8 ``image_BCHW`` where all have one, else ``image_BKCHW`` and ``num_images_B``."""
        if all(len(sample.images) == 1 for sample in samples):
            return {"image_BCHW": stack_images(samples)}
        image_BKCHW, num_images_B = stack_several(samples)
        if image_BKCHW is None:
            shape = len(samples), 0, 3, *self.image_size
            image_BKCHW = torch.empty(shape, dtype=torch.uint8)
        return {"image_BKCHW": image_BKCHW, "num_images_B": num_images_B}

    def _tokens(self, one: Row | Sample) -> Tokens:
        """Ids of a sample's prompt, and of its answer with its end."""
        return self._prompt_ids(self._prompt(one)), self.answer_ids(self.template.learned(one))

    def _prompt(self, one: Row | Sample) -> str:
        return self.template.prompt(one, marks=self.encodes_prompt)

    def _prompt_ids(self, prompt: str) -> list[int]:
        """As the decoder takes it: to be encoded, with images in its midst, or to be continued.

        An encoded text has one end; as the reference has it, each part between two images has one.
        """
        if not self.encodes_prompt:
            return [self.start_id, *self.tokenizer.raw(prompt)]
        parts = [self.tokenizer.raw(part) for part in prompt.split(MARK)]
        ids = list(parts[0])
        for part in parts[1:]:
            ids += [*([self.eos_id] if self.ends_chunks else []), IMAGE_ID, *part]
        return [*ids, self.eos_id]

    # --- what cannot be used

    def usable(self, row: Row) -> None:
        """Raises BadSample for what cannot be learned from."""
        if row.turns and row.turns[-1][0] != "gpt":
            raise BadSample("no answer", "the conversation ends with a question")
        prompt = self._askable(row)
        answer = self.answer_ids(self.template.learned(row))
        if len(answer) == 1:
            raise BadSample("no answer", "it has no tokens")
        # where the decoder continues a text, the end is not part of its input
        taken = len(answer) if self.encodes_prompt else len(prompt) + len(answer) - 1
        if taken > self.max_length:
            raise BadSample(
                "answer too long",
                f"{len(answer)} tokens" + ("" if self.encodes_prompt else f" after {len(prompt)}")
                + f", model.decoder.max_length {self.max_length}",
            )  # fmt: skip

    def askable(self, row: Row) -> None:
        """Raises BadSample for what cannot be answered."""
        self._askable(row)

    def _askable(self, row: Row) -> list[int]:
        prompt = self._prompt_ids(self._prompt(row))
        room = self.max_length - (0 if self.encodes_prompt else 1)
        if len(prompt) > room:
            raise BadSample(
                "prompt too long",
                f"{len(prompt)} of model.decoder.max_length {self.max_length} tokens",
            )
        return prompt

    # --- questions

    def prompts(
        self,
        questions: Sequence[str],
        num_images: Sequence[int] | None = None,
        template: Template | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Ids and mask, int64 [B, P], of questions about so many images each (None: one).

        Padded on the right where they are encoded, on the left where they are continued.
        """
        counts = [1] * len(questions) if num_images is None else num_images
        asked = self.template if template is None else template
        pairs = list(zip(questions, counts, strict=True))
        rows = {  # one question may be asked of many images
            (question, count): self._prompt_ids(
                asked.question(question, count, marks=self.encodes_prompt)
            )
            for question, count in dict.fromkeys(pairs)
        }
        return self.padded([rows[pair] for pair in pairs], left=not self.encodes_prompt)

    def room(self, ids_BP: Tensor) -> int:
        """Tokens that an answer to such prompts may have."""
        return self.max_length - (0 if self.encodes_prompt else ids_BP.shape[1])

    def describe(self, sample: Sample) -> tuple[str, str]:
        """A sample's prompt, and the text that is learned after it."""
        return self._prompt(sample), self.template.learned(sample)


build = VqaTask
