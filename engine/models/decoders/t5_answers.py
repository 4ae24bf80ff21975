"""T5's decoder over short answers: what a prompt gives to its answers is made once.

transformers projects the encoder's states to keys and values for each row of the decoder. Here it
is done once a prompt, however many answers it has. Few queries are not even worth that: they are
brought to the states instead, q · (W s) = (Wᵀ q) · s and Σ a (W s) = W Σ a s.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_FAMILIES = ("t5", "mt5")  # whose blocks are called alike


def fits(model: Any) -> bool:
    """Whether ``decode`` can take the model: not in training, and with its weights whole here."""
    if model.training or model.config.model_type not in _FAMILIES:
        return False
    weights = list(model.decoder.block[0].parameters())
    plain = all(type(weight) is nn.Parameter and weight.numel() for weight in weights)
    return plain and weights[0].dtype != torch.float16  # which transformers clamps


def decode(
    model: Any, said_RL: Tensor, memory_PSD: Tensor, mask_PS: Tensor, rows_R: Tensor
) -> Tensor:
    """States [R, L, D] of answers, each of which attends to its row of ``memory_PSD``."""
    decoder = model.decoder
    hidden_RLD = decoder.embed_tokens(said_RL)
    lowest = torch.finfo(hidden_RLD.dtype).min
    length = said_RL.shape[1]
    later_11LL = hidden_RLD.new_full((1, 1, length, length), lowest).triu(1)
    away_R11S = (mask_PS[rows_R] == 0)[:, None, None]
    mask_R11S = hidden_RLD.new_zeros(away_R11S.shape).masked_fill(away_R11S, lowest)
    position = None
    for block in decoder.block:
        hidden_RLD, position, _ = block.layer[0](
            hidden_RLD, attention_mask=later_11LL, position_bias=position
        )
        hidden_RLD = hidden_RLD + _look(block.layer[1], hidden_RLD, memory_PSD, mask_R11S, rows_R)
        hidden_RLD = block.layer[-1](hidden_RLD)
    return decoder.final_layer_norm(hidden_RLD)


def _look(
    layer: Any, hidden_RLD: Tensor, memory_PSD: Tensor, mask_R11S: Tensor, rows_R: Tensor
) -> Tensor:
    """What cross-attention adds to the answers' states."""
    attention = layer.EncDecAttention
    rows, length, width = hidden_RLD.shape
    size, heads = attention.key_value_proj_dim, attention.n_heads
    query_RLHE = attention.q(layer.layer_norm(hidden_RLD)).view(rows, length, heads, size)
    query_RHLE = query_RLHE.transpose(1, 2)
    # products for each of the memory's states
    of_keys = len(memory_PSD) * width * size
    of_queries = rows * length * (width - size)
    if of_queries < of_keys and type(attention.k) is type(attention.v) is nn.Linear:
        to_key, to_value = (
            linear.weight.view(heads, size, -1) for linear in (attention.k, attention.v)
        )
        memory_RSD = memory_PSD[rows_R]
        near_RQD = (query_RHLE @ to_key).flatten(1, 2)
        weight_RHLS = (near_RQD @ memory_RSD.mT).view(rows, heads, length, -1) + mask_R11S
        seen_RQD = weight_RHLS.softmax(-1).flatten(1, 2) @ memory_RSD
        seen_RHLE = seen_RQD.view(rows, heads, length, -1) @ to_value.mT
    else:
        key_RHSE, value_RHSE = (
            made(memory_PSD).unflatten(-1, (heads, size)).transpose(1, 2)[rows_R]
            for made in (attention.k, attention.v)
        )
        seen_RHLE = F.scaled_dot_product_attention(
            query_RHLE, key_RHSE, value_RHSE, attn_mask=mask_R11S.to(query_RHLE.dtype), scale=1.0
        )
    return attention.o(seen_RHLE.transpose(1, 2).flatten(2))
