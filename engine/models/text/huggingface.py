"""Text encoders from transformers: hub id, local folder, or a configuration with random weights."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor

from engine.config import schema
from engine.models.pretrained import Part, vocabulary, without_pooling_layer
from engine.models.towers import Tower

NAMES = ("huggingface_modelzoo",)


class HuggingfaceTextEncoder(Tower):
    """The hidden states of a transformers encoder, pooled to one vector a text."""

    def __init__(self, model: Any, pool: str, trainable: bool) -> None:
        super().__init__(model, model.config.hidden_size, trainable)
        self.pool = pool

    def forward(self, input_ids_BT: Tensor, attention_mask_BT: Tensor) -> Tensor:
        """Pooled features [B, width]; padding has no influence on them."""
        found = self.model(input_ids=input_ids_BT, attention_mask=attention_mask_BT)
        return pool_tokens(found.last_hidden_state, attention_mask_BT, self.pool)


def pool_tokens(hidden_BTD: Tensor, attention_mask_BT: Tensor, how: str) -> Tensor:
    """The ``first`` or ``last`` token that is not padding, or the ``mean`` of all such."""
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
    """The encoder that ``config`` describes, for a tokenizer of ``vocab_size`` ids. UserError."""
    key = "model.text_encoder"
    part = Part("text encoder", key, config.tag, config.config, config.pretrained)
    found = part.configuration("bert, distilbert, t5, gpt2", vocabulary(vocab_size, pad_id))
    if getattr(found, "use_cache", False):
        found.use_cache = False  # keys and values kept for decoding: never read here
    model, _ = part.load(transformers.AutoModel, found, **without_pooling_layer(found))
    if found.is_encoder_decoder:
        model = model.get_encoder()
    part.check_sizes(model, vocab_size, config.max_length)
    encoder = HuggingfaceTextEncoder(model, config.pool, config.trainable)
    encoder.check_width(config.embedding_dim, part.name, key)
    if config.gradient_checkpointing and config.trainable:
        part.checkpoint_activations(model)
    return encoder
