"""``causal``: the whole of any causal language model, for texts. See ``PrefixDecoder``."""

from __future__ import annotations

import transformers

from engine.config.schema import Decoder as Section
from engine.models.decoders import language_model as lm
from engine.models.decoders import prefix


def build(section: Section, *, vocab_size: int, pad_id: int, eos_id: int) -> prefix.PrefixDecoder:
    """The decoder that ``section`` describes. Raises UserError."""
    config = prefix.configuration(section, vocab_size, pad_id, eos_id)
    model = lm.load(transformers.AutoModelForCausalLM, section, config, vocab_size)
    return prefix.PrefixDecoder(model, eos_id)
