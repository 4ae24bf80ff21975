"""Batches of rows of similar length, so that little is padded (engine/data/samplers/grouped.py)."""

from __future__ import annotations

from engine.data.samplers.grouped import Grouped, Kind
from engine.data.samplers.pool import SamplerInputs


def build(inputs: SamplerInputs) -> Grouped:
    """Raises UserError for less than one batch."""
    texts = inputs.texts()
    everything = Kind(0, [None] * len(inputs.sizes), texts, inputs.batch_size)
    return Grouped(inputs, [everything], texts)
