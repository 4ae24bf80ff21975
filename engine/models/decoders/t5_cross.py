"""T5's decoder over image tokens: every layer attends to them as it would to an encoded text.

The encoder of T5 has no part in it and is not loaded.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

import engine.torchvision_ops  # noqa: F401  before transformers, which imports torchvision

import transformers  # isort: skip
from transformers.modeling_outputs import BaseModelOutput  # isort: skip
from engine.config.model import Decoder as Section
from engine.errors import UserError
from engine.models.decoders import language_model as lm
from engine.models.decoders.language_model import Decoder

_KINDS = ("t5", "mt5", "umt5")


class T5CrossDecoder(Decoder):
    """Image tokens as the memory of cross-attention."""

    def hidden(self, image_BND: Tensor, input_ids_BT: Tensor, attention_mask_BT: Tensor) -> Tensor:
        """States [B, T, D] of the text, ready for the head."""
        hidden_BTD = self.model.decoder(
            input_ids=input_ids_BT,
            attention_mask=attention_mask_BT,
            encoder_hidden_states=image_BND,
            use_cache=False,
        ).last_hidden_state
        if self.model.config.scale_decoder_outputs:  # where the head is the table of tokens
            hidden_BTD = hidden_BTD * self.model.config.d_model**-0.5
        return hidden_BTD

    def generate(
        self, image_BND: Tensor, prompt_ids_BT: Tensor, prompt_mask_BT: Tensor, **options: Any
    ) -> Tensor:
        """Texts after the prompt, int64 [B · num_return_sequences, new tokens]."""
        found = self.model.generate(
            # a new object for each call: generate repeats its rows in place
            encoder_outputs=BaseModelOutput(last_hidden_state=image_BND),
            decoder_input_ids=prompt_ids_BT,
            decoder_attention_mask=prompt_mask_BT,
            **options,
        )
        return found[:, prompt_ids_BT.shape[1] :]


def build(section: Section, *, vocab_size: int, pad_id: int, eos_id: int) -> T5CrossDecoder:
    """The decoder that ``section`` describes. Raises UserError."""
    config = lm.configuration_of(
        section, vocab_size, pad_id, encoder_decoder=True, examples="t5, mt5 and umt5"
    )
    if config.model_type not in _KINDS:
        raise UserError(
            f"t5_cross takes models of the families {', '.join(_KINDS)}, not {config.model_type!r}",
            key=f"{lm.KEY}.tag" if section.tag else f"{lm.KEY}.config.model_type",
        )
    if config.num_decoder_layers is None:
        config.num_decoder_layers = config.num_layers
    config.num_layers = 0  # of the encoder
    if getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = pad_id
    config.eos_token_id = eos_id
    model = lm.load(transformers.AutoModelForSeq2SeqLM, section, config)
    lm.check_sizes(model, section, vocab_size)
    model.encoder.requires_grad_(False)  # its last norm, which nothing runs through
    lm.checkpoint_activations(model.decoder, section)
    return T5CrossDecoder(model, config.d_model, config.decoder_start_token_id)
