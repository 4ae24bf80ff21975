"""Text encoders from transformers: hub id, local folder, or a configuration with random weights."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

import engine.torchvision_ops  # noqa: F401  before transformers, which imports torchvision

import transformers  # isort: skip
from engine.config import schema
from engine.errors import UserError
from engine.models import pretrained

NAMES = ("huggingface_modelzoo",)

_KEY = "model.text_encoder"


class HuggingfaceTextEncoder(nn.Module):
    """The hidden states of a transformers encoder, pooled to one vector a text."""

    def __init__(self, model: Any, pool: str = "first", trainable: bool = True) -> None:
        super().__init__()
        self.model = model
        self.pool = pool
        self.trainable = trainable
        self.width = int(model.config.hidden_size)
        self.requires_grad_(trainable)
        self.train(trainable)

    def train(self, mode: bool = True) -> HuggingfaceTextEncoder:
        """A frozen tower stays in evaluation mode, so that its dropout is off."""
        return super().train(mode and self.trainable)

    def tokens(self, input_ids_BT: Tensor, attention_mask_BT: Tensor) -> Tensor:
        """Last hidden states [B, T, D]; those of padding are meaningless."""
        output = self.model(input_ids=input_ids_BT, attention_mask=attention_mask_BT)
        return output.last_hidden_state

    def forward(self, input_ids_BT: Tensor, attention_mask_BT: Tensor) -> Tensor:
        """Pooled features [B, width]; padding has no influence on them."""
        hidden_BTD = self.tokens(input_ids_BT, attention_mask_BT)
        return pool_tokens(hidden_BTD, attention_mask_BT, self.pool)


def pool_tokens(hidden_BTD: Tensor, attention_mask_BT: Tensor, how: str) -> Tensor:
    """The ``first`` or ``last`` token that is no padding, or the ``mean`` of all such."""
    if how == "mean":
        weight_BT1 = attention_mask_BT.unsqueeze(-1).to(hidden_BTD.dtype)
        return (hidden_BTD * weight_BT1).sum(1) / weight_BT1.sum(1).clamp_min(1)
    real_BT = attention_mask_BT.to(torch.uint8)
    if how == "last":
        at_B = real_BT.shape[1] - 1 - real_BT.flip(1).argmax(1)
    else:
        at_B = real_BT.argmax(1)  # 0 unless the padding is on the left
    return hidden_BTD[torch.arange(at_B.shape[0], device=at_B.device), at_B]


def build(
    config: schema.TextEncoder, *, vocab_size: int, pad_id: int | None
) -> HuggingfaceTextEncoder:
    """The encoder that ``config`` describes, for a tokenizer of ``vocab_size`` ids.

    Raises UserError for a model that cannot be had, options that it does not know, a table of
    tokens or positions too small for the tokenizer, and a width other than the declared one.
    """
    model = _model(config, _configuration(config, vocab_size, pad_id))
    _check_sizes(model, config, vocab_size)
    encoder = HuggingfaceTextEncoder(model, config.pool, config.trainable)
    if config.embedding_dim not in (None, encoder.width):
        raise UserError(
            f"text encoder {pretrained.name(config)} puts out vectors of {encoder.width} "
            f"numbers, not {config.embedding_dim}; set {_KEY}.embedding_dim: {encoder.width} or "
            "leave it out",
            key=f"{_KEY}.embedding_dim",
        )
    if config.gradient_checkpointing and config.trainable:
        pretrained.checkpoint_activations(model, config, key=_KEY, what="text encoder")
    return encoder


def _configuration(
    config: schema.TextEncoder, vocab_size: int, pad_id: int | None
) -> transformers.PretrainedConfig:
    found = pretrained.configuration(
        config,
        key=_KEY,
        what="text encoder",
        examples="bert, distilbert, t5, gpt2",
        more=pretrained.vocabulary(vocab_size, pad_id),
    )
    if getattr(found, "use_cache", False):
        found.use_cache = False  # keys and values kept for decoding: never read here
    return found


def _model(config: schema.TextEncoder, configuration: transformers.PretrainedConfig) -> Any:
    """The bare encoder, without a pooling layer that nothing would train."""
    options: dict[str, Any] = {}
    mapped: Any = transformers.MODEL_MAPPING.get(type(configuration), None)
    if isinstance(mapped, type) and "add_pooling_layer" in inspect.signature(mapped).parameters:
        options["add_pooling_layer"] = False
    with pretrained.building(config, key=_KEY, what="text encoder"):
        if config.pretrained:
            options |= {"config": configuration, "dtype": torch.float32}
            model = pretrained.cached_first(transformers.AutoModel, config.tag, **options)
        else:
            model = transformers.AutoModel.from_config(configuration, **options)
    return model.get_encoder() if configuration.is_encoder_decoder else model


def _check_sizes(model: Any, config: schema.TextEncoder, vocab_size: int) -> None:
    table = model.get_input_embeddings()
    if table.num_embeddings < vocab_size:
        raise UserError(
            f"the tokenizer has {vocab_size} ids but text encoder {pretrained.name(config)} knows "
            f"only {table.num_embeddings}; use the model's own tokenizer, or a larger vocab_size",
            key=f"{_KEY}.tokenizer",
        )
    limit = pretrained.max_positions(model)
    if limit is not None and config.max_length > limit:
        raise UserError(
            f"max_length {config.max_length} is more than the {limit} positions of text encoder "
            f"{pretrained.name(config)}",
            key=f"{_KEY}.max_length",
        )
