"""What decoders of T5's family have in common: their configuration, and a pass of the decoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

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
            key=f"{lm.KEY}.tag" if section.tag else f"{lm.KEY}.config.model_type",
        )
    if config.num_decoder_layers is None:
        config.num_decoder_layers = config.num_layers
    if getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = pad_id
    config.eos_token_id = eos_id
    return config


def load(section: Section, config: transformers.PretrainedConfig, vocab_size: int) -> Any:
    """The model, with the tag's weights if ``pretrained``. Raises UserError."""
    model = lm.load(transformers.AutoModelForSeq2SeqLM, section, config)
    lm.check_sizes(model, section, vocab_size)
    return model


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
