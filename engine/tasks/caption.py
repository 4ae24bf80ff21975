"""Captions: a decoder that speaks about what an image encoder has seen.

A batch holds prompt and caption as one text: the start token, the prompt, the caption, its end.
``labels_BT`` at t is the token after position t, and counts from the caption's first token on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from engine import registry
from engine.config.schema import Config
from engine.data.batch_memory import stack_images
from engine.data.text.templates import fill, template
from engine.data.text.tokenizer import TextTokenizer
from engine.data.transforms.geometry import square
from engine.data.transforms.pipeline import output_size
from engine.dist import collectives
from engine.errors import UserError
from engine.losses.language_model import IGNORED
from engine.models import connectors
from engine.models.idle import freeze_idle
from engine.models.vision_language import VisionLanguage
from engine.types import BadSample, Batch, Features, Record, Sample

TEXT_PART = "decoder"  # the part of the model whose tokenizer the task takes


class CaptionTask:
    """Texts after images, learned token by token."""

    modalities = ("image", "caption")
    rows_interact = False

    def __init__(self, config: Config, tokenizer: TextTokenizer) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.max_length = config.model.decoder.max_length
        prompt = config.data.prompt
        self.template = template(prompt.template, key="data.prompt.template")
        self.eos_id = tokenizer.end_id
        self.start_id = tokenizer.pad_id  # until the decoder says its own
        longest = len(self._prompt_ids(prompt.instruction)) + 2  # start and one token
        if longest > self.max_length:
            raise UserError(
                f"the prompt takes {longest - 2} tokens and leaves none for a caption within "
                f"{self.max_length}; shorten data.prompt or raise model.decoder.max_length",
                key="model.decoder.max_length",
            )

    def build_model(self) -> VisionLanguage:
        """Image encoder, connector and decoder, on the CPU."""
        model, transforms = self.config.model, self.config.transforms
        size = output_size(transforms.train_transforms, transforms)
        image = registry.find(
            "models/image", model.image_encoder.name, key="model.image_encoder.name"
        ).build(model.image_encoder, image_size=model.image_encoder.image_size or square(size))
        freeze_idle(image, model.connector.layer, size)
        decoder = registry.find(
            "models/decoders", model.decoder.name, key="model.decoder.name"
        ).build(
            model.decoder,
            vocab_size=self.tokenizer.vocab_size,
            pad_id=self.tokenizer.pad_id,
            eos_id=self.eos_id,
        )
        self.start_id = decoder.start_id
        return VisionLanguage(
            image,
            connectors.build(model.connector.name, image.token_width, decoder.width),
            decoder,
            layer=model.connector.layer,
            keep_prefix=model.connector.keep_cls,
            label_smoothing=self.config.loss.language_model.label_smoothing,
            mean=transforms.normalize.mean,
            std=transforms.normalize.std,
        )

    def batch(self, samples: list[Sample]) -> Batch:
        """Collate: uint8 ``image_BCHW``; ids, mask and labels padded to the longest text."""
        texts = [self._text(sample) for sample in samples]
        ids, labels = zip(*texts, strict=True)
        input_ids_BT = pad_sequence(
            list(ids), batch_first=True, padding_value=self.tokenizer.pad_id
        )
        lengths_B = torch.tensor([len(one) for one in ids])
        return {
            "input_ids_BT": input_ids_BT,
            "attention_mask_BT": (torch.arange(input_ids_BT.shape[1]) < lengths_B[:, None]).long(),
            "labels_BT": pad_sequence(list(labels), batch_first=True, padding_value=IGNORED),
            "image_BCHW": stack_images(samples),
            "dataset_B": torch.tensor([sample.dataset for sample in samples]),
            "index_B": torch.tensor([sample.index for sample in samples]),
        }

    def _text(self, sample: Sample) -> tuple[Tensor, Tensor]:
        """(ids, labels), int64 [T]: all tokens but the last, and all but the first."""
        before, after = self._halves(sample)
        whole = [*before, *after[: max(0, self.max_length - len(before))], self.eos_id]
        labels = [IGNORED] * (len(before) - 1) + whole[len(before) :]
        return torch.tensor(whole[:-1]), torch.tensor(labels)

    def _halves(self, sample: Sample | Record) -> tuple[list[int], list[int]]:
        """Ids of the start and the prompt, and of the text to learn."""
        prompt, caption = self.pair(sample)
        after = self.tokenizer.raw(self.tokenizer.clean(caption))
        return [self.start_id, *self._prompt_ids(prompt)], after

    def usable(self, record: Record) -> None:
        """Raises BadSample where no token of the caption could be learned."""
        before, after = self._halves(record)
        if not after:
            raise BadSample("no caption", "it has no tokens")
        if len(before) >= self.max_length:
            raise BadSample(
                "prompt too long",
                f"{len(before)} of model.decoder.max_length {self.max_length} tokens",
            )

    def pair(self, sample: Sample | Record) -> tuple[str, str]:
        """(instruction or question, the text to learn) of a sample."""
        for (role, said), (next_role, answer) in zip(sample.turns, sample.turns[1:], strict=False):
            if (role, next_role) == ("human", "gpt"):
                return said.replace("<image>", "").strip(), answer
        text = sample.caption if isinstance(sample, Record) else sample.text
        return self.config.data.prompt.instruction, text

    def _prompt_ids(self, instruction: str) -> list[int]:
        return self.tokenizer.raw(fill(self.template, instruction=instruction))

    def prompts(self, instructions: list[str]) -> tuple[Tensor, Tensor]:
        """Ids and mask of prompts to be gone on with, int64 [B, P], padded on the left."""
        rows = [[self.start_id, *self._prompt_ids(one)] for one in instructions]
        longest = max(map(len, rows))
        pads = [longest - len(row) for row in rows]
        ids = [[self.tokenizer.pad_id] * n + row for n, row in zip(pads, rows, strict=True)]
        mask = [[0] * n + [1] * (longest - n) for n in pads]
        return torch.tensor(ids), torch.tensor(mask)

    def features(self, model: Callable[..., Any], batch: Batch) -> Features:
        """Each row's loss and number of supervised tokens: a step holds no logits."""
        return Features(model(batch))

    def losses(self, features: Features) -> dict[str, Tensor]:
        """Mean over all ranks' supervised tokens; the mean over ranks of L_r is that."""
        nll_B, tokens_B = features.per_sample["nll_B"], features.per_sample["tokens_B"]
        total = collectives.all_reduce_(tokens_B.sum().to(nll_B.dtype), "sum")
        loss = nll_B.sum() * (collectives.world() / total.clamp_min(1))
        return {"loss": loss}


def build(config: Config, tokenizer: Callable[[], TextTokenizer]) -> CaptionTask:
    """The task of ``--task=caption``."""
    return CaptionTask(config, tokenizer())
