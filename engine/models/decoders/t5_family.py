"""What decoders of T5's family have in common: their configuration, and passes of the decoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from engine.config.schema import Decoder as Section
from engine.errors import UserError
from engine.models.decoders import language_model as lm
from engine.models.pretrained import vocabulary

# whether a model's states are scaled before the head, because that is the table of tokens
_SCALED: dict[str, Callable[[Any], bool]] = {
    "t5": lambda config: config.scale_decoder_outputs,
    "mt5": lambda config: False,
    "umt5": lambda config: config.tie_word_embeddings,
}


def configuration(section: Section, vocab_size: int, pad_id: int, eos_id: int) -> Any:
    """The model's configuration, its start token among it. Raises UserError for another family."""
    part, families = lm.part_of(section), ", ".join(_SCALED)
    config: Any = part.configuration(families, vocabulary(vocab_size, pad_id))
    if config.model_type not in _SCALED:
        raise UserError(
            f"{section.name} takes models of the families {families}, not {config.model_type!r}; "
            f"{lm.KEY}.name: causal takes causal language models",
            key=part.model_key,
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
    found = model.decoder(
        input_ids=ids_BT,
        attention_mask=mask_BT,
        encoder_hidden_states=memory_BSD,
        encoder_attention_mask=memory_mask_BS,
        use_cache=False,
    )
    return scaled(model, found.last_hidden_state)


def scaled(model: Any, hidden_BTD: Tensor) -> Tensor:
    """The decoder's states as the head takes them."""
    if _SCALED[model.config.model_type](model.config):
        return hidden_BTD * model.config.d_model**-0.5
    return hidden_BTD
