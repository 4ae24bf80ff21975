"""What decoders of T5's family have in common: their configuration, and passes of the decoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import engine.torchvision_ops  # noqa: F401  before transformers, which imports torchvision

import transformers  # isort: skip
from engine.config.schema import Decoder as Section
from engine.errors import UserError
from engine.models.decoders import language_model as lm

# whether a model's states are scaled before the head, because that is the table of tokens
_SCALED: dict[str, Callable[[Any], bool]] = {
    "t5": lambda config: config.scale_decoder_outputs,
    "mt5": lambda config: False,
    "umt5": lambda config: config.tie_word_embeddings,
}

_SAME_BLOCKS = ("t5", "mt5")  # families whose blocks have the same names


def configuration(
    section: Section, vocab_size: int, pad_id: int, eos_id: int
) -> transformers.PretrainedConfig:
    """The model's configuration, its start token among it. Raises UserError for another family."""
    config = lm.configuration_of(
        section, vocab_size, pad_id, encoder_decoder=True, examples="t5, mt5 and umt5"
    )
    if config.model_type not in _SCALED:
        raise UserError(
            f"{section.name} takes models of the families {', '.join(_SCALED)}, not "
            f"{config.model_type!r}",
            key=lm.part_of(section).model_key,
        )
    if config.num_decoder_layers is None:
        config.num_decoder_layers = config.num_layers
    if getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = pad_id
    config.eos_token_id = eos_id
    return config


def decode(
    model: Any,
    ids_BT: Tensor,
    mask_BT: Tensor | None,
    memory_BSD: Tensor,
    memory_mask_BS: Tensor | None = None,
) -> Tensor:
    """States [B, T, D] of a text that attends to ``memory_BSD``, ready for the head."""
    hidden_BTD = model.decoder(
        input_ids=ids_BT,
        attention_mask=mask_BT,
        encoder_hidden_states=memory_BSD,
        encoder_attention_mask=memory_mask_BS,
        use_cache=False,
    ).last_hidden_state
    return scaled(model, hidden_BTD)


def scaled(model: Any, hidden_BTD: Tensor) -> Tensor:
    """The decoder's states as the head takes them."""
    if _SCALED[model.config.model_type](model.config):
        hidden_BTD = hidden_BTD * model.config.d_model**-0.5
    return hidden_BTD


# --- answers that share prompts


def shares_memory(model: Any) -> bool:
    """Whether ``decode_answers`` can take the model: not in training, its weights not sharded."""
    if model.training or model.config.model_type not in _SAME_BLOCKS:
        return False
    weights = list(model.decoder.block[0].parameters())
    plain = all(type(weight) is nn.Parameter and weight.numel() for weight in weights)
    return plain and weights[0].dtype != torch.float16  # which transformers clamps


def decode_answers(
    model: Any, ids_RL: Tensor, memory_PSD: Tensor, mask_PS: Tensor, rows_R: Tensor
) -> Tensor:
    """States [R, L, D] of answers, each of which attends to its row of ``memory_PSD``.

    transformers projects the encoder's states to keys and values for each row of the decoder. Here
    it is done once a prompt, however many answers it has. For few queries not even that pays: they
    are brought to the states instead, q · (W s) = (Wᵀ q) · s and Σ a (W s) = W Σ a s.
    """
    decoder = model.decoder
    hidden_RLD = decoder.embed_tokens(ids_RL)
    lowest = torch.finfo(hidden_RLD.dtype).min
    length = ids_RL.shape[1]
    later_11LL = hidden_RLD.new_full((1, 1, length, length), lowest).triu(1)
    away_R11S = (mask_PS[rows_R] == 0)[:, None, None]
    mask_R11S = hidden_RLD.new_zeros(away_R11S.shape).masked_fill(away_R11S, lowest)
    position = None
    for block in decoder.block:
        hidden_RLD, position, _ = block.layer[0](
            hidden_RLD, attention_mask=later_11LL, position_bias=position
        )
        hidden_RLD = hidden_RLD + _cross_attention(
            block.layer[1], hidden_RLD, memory_PSD, mask_R11S, rows_R
        )
        hidden_RLD = block.layer[-1](hidden_RLD)
    return scaled(model, decoder.final_layer_norm(hidden_RLD))


def _cross_attention(
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
