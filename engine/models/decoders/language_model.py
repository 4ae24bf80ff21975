"""What decoders have in common: a transformers model, its head, its sizes and its start."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import engine.torchvision_ops  # noqa: F401  before transformers, which imports torchvision

import transformers  # isort: skip
from engine.config.model import Decoder as Section
from engine.errors import UserError
from engine.losses.language_model import row_losses
from engine.models import pretrained

KEY = "model.decoder"


class Decoder(nn.Module):
    """A language model that speaks about images: subclasses say how it sees them.

    ``width`` is that of the image tokens it takes, ``start_id`` the token that a text begins with.
    """

    def __init__(self, model: Any, width: int, start_id: int) -> None:
        super().__init__()
        self.model = model
        self.width, self.start_id = width, start_id

    def hidden(self, image_BND: Tensor, input_ids_BT: Tensor, attention_mask_BT: Tensor) -> Tensor:
        """States [B, T, D] of the text, ready for the head: that at t predicts the token after."""
        raise NotImplementedError

    def head(self) -> tuple[Tensor, Tensor | None]:
        """Weight [V, D] and bias [V] of the output layer."""
        layer = self.model.get_output_embeddings()
        return layer.weight, getattr(layer, "bias", None)

    def nll(
        self,
        image_BND: Tensor,
        input_ids_BT: Tensor,
        attention_mask_BT: Tensor,
        labels_BT: Tensor,
        label_smoothing: float = 0.0,
    ) -> Tensor:
        """Σ −log p of each row's supervised labels, [B], in fp32 or wider."""
        hidden_BTD = self.hidden(image_BND, input_ids_BT, attention_mask_BT)
        return row_losses(hidden_BTD, labels_BT, *self.head(), label_smoothing=label_smoothing)

    def generate(
        self, image_BND: Tensor, prompt_ids_BT: Tensor, prompt_mask_BT: Tensor, **options: Any
    ) -> Tensor:
        """Texts after the prompt, int64 [B · num_return_sequences, new tokens], by ``generate``.

        Prompts begin with ``start_id`` and are padded on the left. ``options`` are those of
        transformers' ``generate``.
        """
        raise NotImplementedError


def load(auto: Any, section: Section, configuration: Any) -> Any:
    """The model of ``configuration``, with the tag's weights if ``pretrained``. UserError."""
    with pretrained.building(section, key=KEY, what="decoder"):
        if not section.pretrained:
            return auto.from_config(configuration)
        options = {"config": configuration, "dtype": torch.float32}
        return pretrained.cached_first(auto, section.tag, **options)


def configuration_of(
    section: Section, vocab_size: int, pad_id: int, *, encoder_decoder: bool, examples: str
) -> transformers.PretrainedConfig:
    """The decoder's configuration. Raises UserError for one of the other family."""
    found = pretrained.configuration(
        section,
        key=KEY,
        what="decoder",
        examples=examples,
        more=pretrained.vocabulary(vocab_size, pad_id),
    )
    if bool(found.is_encoder_decoder) != encoder_decoder:
        other = "causal" if encoder_decoder else "t5_cross"
        raise UserError(
            f"decoder {section.name!r} cannot be a {found.model_type!r} model; "
            f"known are {examples}, or set {KEY}.name: {other}",
            key=f"{KEY}.tag" if section.tag else f"{KEY}.config.model_type",
        )
    return found


def check_sizes(model: Any, section: Section, vocab_size: int) -> None:
    """Raises UserError where ids or positions are asked for that the model has no row for."""
    known = model.get_input_embeddings().num_embeddings
    if known < vocab_size:
        raise UserError(
            f"the tokenizer has {vocab_size} ids but decoder {pretrained.name(section)} knows only "
            f"{known}; use the model's own tokenizer, or a larger vocab_size",
            key=f"{KEY}.tokenizer",
        )
    limit = pretrained.max_positions(model)
    if limit is not None and section.max_length > limit:
        raise UserError(
            f"max_length {section.max_length} is more than the {limit} positions of decoder "
            f"{pretrained.name(section)}",
            key=f"{KEY}.max_length",
        )


def checkpoint_activations(model: Any, section: Section) -> None:
    """Recompute activations in backward, where ``gradient_checkpointing`` asks for it."""
    if not section.gradient_checkpointing:
        return
    pretrained.checkpoint_activations(model, section, key=KEY, what="decoder")
