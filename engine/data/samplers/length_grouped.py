"""Batches of rows of similar length, so that little is padded (engine/data/samplers/grouped.py)."""

from engine.data.samplers.grouped import Grouped, Kind
from engine.data.samplers.pool import SamplerInputs


def build(inputs: SamplerInputs) -> Grouped:
    """Raises UserError for less than one batch."""
    texts = inputs.texts()
    return Grouped(inputs, texts, [Kind(0, [None] * len(inputs.sizes), texts, inputs)])
