"""Object recognition as next-token prediction (NXTP, arXiv 2312.02142): labels of an image.

A batch holds a prompt and an image's labels as one row. Each label's first token follows the
prompt, and no label sees another, so that their order means nothing (``model.decoder.mask:
independent``); ``nxtp`` is the rule of the paper's code. Labels that do not fit into
``model.decoder.max_length`` wait for another epoch's order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.config.schema import Config
from engine.data.batch_memory import places, stack_images
from engine.data.text import labels as label_text
from engine.data.text.labels import LabelRow, LabelText
from engine.data.text.tokenizer import TextTokenizer
from engine.errors import UserError
from engine.models.vision_language import Recognizer
from engine.tasks.language import LanguageTask
from engine.types import BadSample, Batch, Row, Sample


class RecognizeTask(LanguageTask):
    """Labels after images, learned token by token."""

    modalities = ("image", "labels")
    decoders = ("truncated",)
    model_class = Recognizer

    @classmethod
    def more_texts(cls, config: Config) -> list[str]:
        """The prompts, often enough to be noticed."""
        return 2 * [config.data.labels.prompt, *config.data.labels.train_prompts]

    def __init__(self, config: Config, tokenizer: TextTokenizer) -> None:
        super().__init__(config, tokenizer)
        self.section, decoder = config.data.labels, config.model.decoder
        self.image_ids: list[int] = []  # of the mark between image and text
        if decoder.image_token is not None:
            self.image_ids.append(tokenizer.add_special(decoder.image_token))
        self.text = LabelText(tokenizer, self.section)
        self.separator_id = self.text.separator_id
        self.nxtp = decoder.mask == "nxtp"
        self.per_label = decoder.positions == "per_label" or (
            decoder.positions == "auto" and not self.nxtp
        )
        prompts = [self.section.prompt, *self.section.train_prompts]
        self.longest_prompt = max(len(self._before(prompt)) for prompt in prompts)
        if self.longest_prompt + 2 > self.max_length:  # a token and the separator
            raise UserError(
                f"a prompt takes {self.longest_prompt} tokens and leaves none for a label within "
                f"{self.max_length}; shorten data.labels' prompts or raise "
                "model.decoder.max_length",
                key="model.decoder.max_length",
            )

    def batch(self, samples: list[Sample]) -> Batch:
        """Collate: uint8 ``image_BCHW``; texts as ``PrefixDecoder.label_losses`` takes them."""
        rows = [self.row(sample) for sample in samples]
        texts = label_text.stack(rows, self.tokenizer.pad_id)
        return texts | {"image_BCHW": stack_images(samples)} | places(samples)

    def pictures(self, samples: list[Sample]) -> Batch:
        """Collate of images alone, whose labels are to be found."""
        return {"image_BCHW": stack_images(samples)} | places(samples)

    def row(self, sample: Sample) -> LabelRow:
        """A sample's prompt and as many of its labels, in the order of its seed, as fit."""
        before = self._before(self.text.train_prompt(sample.seed))
        labels = label_text.labels_of(sample.row, self.section)
        room, chosen = self.max_length - len(before), []
        for label in self.text.order(labels, sample.seed):
            ids = self.text.ids(label)
            if len(ids) <= room:
                chosen.append(ids)
                room -= len(ids)
        return label_text.lay_out(before, chosen, nxtp=self.nxtp, per_label=self.per_label)

    def _before(self, prompt: str) -> list[int]:
        return [*self.image_ids, self.start_id, *self.tokenizer.raw(prompt)]

    def usable(self, row: Row) -> None:
        """Raises BadSample where no label can be learned, or one holds the separator."""
        labels = label_text.labels_of(row, self.section)
        if not labels:
            what = "it has none; data.labels.source: nouns takes those of captions"
            if self.section.source == "nouns":
                what = "no noun in its caption"
            raise BadSample("no label", what)
        shortest = min((self.text.ids(label) for label in labels), key=len)
        if self.longest_prompt + len(shortest) > self.max_length:
            raise BadSample(
                "label too long",
                f"the shortest takes {len(shortest)} tokens behind a prompt of "
                f"{self.longest_prompt}; model.decoder.max_length is {self.max_length}",
            )

    def describe(self, sample: Sample) -> tuple[str, str]:
        """A sample's prompt, and the text that is learned after it."""
        labels = self.text.order(label_text.labels_of(sample.row, self.section), sample.seed)
        mark = f"{self.section.separator} "
        return self.text.train_prompt(sample.seed), mark.join(labels) + self.section.separator

    def prompt_ids(self) -> Tensor:
        """Ids of what stands behind every image where labels are asked for, int64 [P]."""
        return torch.tensor(self._before(self.section.prompt))

    def room(self) -> int:
        """Tokens that a label may have, its separator included."""
        return self.max_length - len(self._before(self.section.prompt))


build = RecognizeTask
