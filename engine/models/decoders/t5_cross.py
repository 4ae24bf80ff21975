"""T5's decoder over image tokens: every layer attends to them as it would to an encoded text.

The encoder of T5 has no part in it and is not loaded.
"""

from __future__ import annotations

from typing import Any

import transformers
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from engine.config.schema import Decoder as Section
from engine.models.decoders import language_model as lm
from engine.models.decoders import t5_family
from engine.models.decoders.language_model import Decoder, DecoderInput


class T5CrossDecoder(Decoder):
    """Image tokens as the memory of cross-attention, one image a row."""

    def hidden(self, given: DecoderInput) -> Tensor:
        return t5_family.decode(self.model, given.ids_BT, given.mask_BT, given.image_MND)

    def generate(self, given: DecoderInput, **options: Any) -> Tensor:
        found = self.model.generate(
            # a new object for each call: generate repeats its rows in place
            encoder_outputs=BaseModelOutput(last_hidden_state=given.image_MND),
            decoder_input_ids=given.ids_BT,
            decoder_attention_mask=given.mask_BT,
            **options,
        )
        return found[:, given.ids_BT.shape[1] :]


def build(section: Section, *, vocab_size: int, pad_id: int, eos_id: int) -> T5CrossDecoder:
    """The decoder that ``section`` describes. Raises UserError."""
    config = t5_family.configuration(section, vocab_size, pad_id, eos_id)
    config.num_layers = 0  # of the encoder
    model = lm.load(transformers.AutoModelForSeq2SeqLM, section, config, vocab_size)
    # nothing runs through it; the encoder's table of tokens is the decoder's own
    model.encoder.final_layer_norm.requires_grad_(False)
    return T5CrossDecoder(model, config.d_model, config.decoder_start_token_id)
