"""What tasks have in common that speak about images: their model, loss, and texts as tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from engine import registry
from engine.config.schema import Config
from engine.data.text.templates import template
from engine.data.text.tokenizer import TextTokenizer
from engine.data.transforms.geometry import square
from engine.data.transforms.pipeline import output_size
from engine.dist import collectives
from engine.errors import UserError
from engine.losses.language_model import IGNORED
from engine.models.vision_language import (
    Positions,
    VisionLanguage,
    build_connector,
    freeze_unused,
)  # fmt: skip
from engine.types import Batch, Features, Task

Tokens = tuple[list[int], list[int]]
"""Ids of what stands before a text to learn, and of that text with its end."""


class LanguageTask(Task):
    """A task whose model is an image encoder, a connector and a decoder."""

    text_part = "decoder"
    tokenizer: TextTokenizer
    decoders: tuple[str, ...] = ()  # those of the engine's that the task can take
    other_task = ""  # what to do where another one is asked for
    model_class: type[VisionLanguage] = VisionLanguage

    def __init__(self, config: Config, tokenizer: TextTokenizer) -> None:
        super().__init__(config, tokenizer)
        self.max_length = config.model.decoder.max_length
        prompt, key = config.data.prompt, "data.prompt.template"
        self.template = template(prompt.template, key=key, instruction=prompt.instruction)
        self.eos_id = tokenizer.end_id
        self.start_id = tokenizer.pad_id  # until the decoder says its own
        name = config.model.decoder.name
        own = registry.names("models/decoders").get(name)
        if own is not None and own not in self.decoders:
            raise UserError(
                f"decoder {name!r} is not for this task; take {' or '.join(self.decoders)}"
                + self.other_task,
                key="model.decoder.name",
            )

    def build_model(self) -> VisionLanguage:
        """Image encoder, connector and decoder, on the CPU."""
        model, transforms = self.config.model, self.config.transforms
        size, connector = self.image_size, model.connector
        image_size = model.image_encoder.image_size or square(size)
        image = self.part("models/image", "model.image_encoder", image_size=image_size)
        freeze_unused(image, connector.layer, size)
        decoder = self.part(
            "models/decoders",
            "model.decoder",
            vocab_size=self.tokenizer.vocab_size,
            pad_id=self.tokenizer.pad_id,
            eos_id=self.eos_id,
        )
        self.start_id, positions = decoder.start_id, None
        if connector.positions is not None:
            prefix = image.num_prefix_tokens if connector.keep_cls else 0
            positions = Positions(size[0] / size[1], prefix)
        return self.model_class(
            image,
            build_connector(connector.name, image.token_width, decoder.width, positions),
            decoder,
            layer=connector.layer,
            keep_prefix=connector.keep_cls,
            label_smoothing=self.config.loss.language_model.label_smoothing,
            mean=transforms.normalize.mean,
            std=transforms.normalize.std,
        )

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width that training images come in."""
        transforms = self.config.transforms
        return output_size(transforms.train_transforms, transforms)

    def answer_ids(self, text: str) -> list[int]:
        """A text's tokens and its end."""
        return [*self.tokenizer.raw(text), self.eos_id]

    def as_one_text(self, pairs: Sequence[Tokens]) -> Batch:
        """``input_ids_BT``, ``attention_mask_BT`` and ``labels_BT`` of prompts with their targets.

        Labels at t are the tokens after position t, from the first one that is learned on.
        """
        rows = [before + after for before, after in pairs]
        labels = [[IGNORED] * (len(before) - 1) + after for before, after in pairs]
        ids_BT, mask_BT = self.padded([row[:-1] for row in rows])
        labels_BT = _rectangle(labels, IGNORED)
        return {"input_ids_BT": ids_BT, "attention_mask_BT": mask_BT, "labels_BT": labels_BT}

    def padded(self, rows: Sequence[list[int]], *, left: bool = False) -> tuple[Tensor, Tensor]:
        """Ids and their mask, int64, padded to the longest row."""
        side = "left" if left else "right"
        mask_BT = _rectangle([[1] * len(row) for row in rows], 0, side)
        return _rectangle(rows, self.tokenizer.pad_id, side), mask_BT

    def blank(self, batch: Batch) -> Batch:
        """The batch with nothing to learn in it: it counts for no loss and has no gradient."""
        blank: Batch = {**batch, "blank": True}
        for name in batch.keys() & {"labels_BT", "labels_BL"}:
            blank[name] = torch.full_like(batch[name], IGNORED)
        return blank

    def features(self, model: Callable[..., Any], batch: Batch) -> Features:
        """Each row's loss and number of supervised tokens: a step holds no logits."""
        return Features(model(batch))

    def losses(self, features: Features) -> dict[str, Tensor]:
        """Mean over all ranks' supervised tokens; the mean over ranks of L_r is that."""
        nll_B, tokens_B = features.per_sample["nll_B"], features.per_sample["tokens_B"]
        total = collectives.all_reduce_(tokens_B.sum().to(nll_B.dtype), "sum")
        loss = nll_B.sum() * (collectives.world() / total.clamp_min(1))
        return {"loss": loss}


def _rectangle(rows: Sequence[list[int]], value: int, side: str = "right") -> Tensor:
    return pad_sequence(
        [torch.tensor(row, dtype=torch.int64) for row in rows],
        batch_first=True,
        padding_value=value,
        padding_side=side,
    )
