"""Batches of rows of similar length, so that little is padded (engine/data/samplers/grouped.py)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engine.config.schema import DebiasSampling
from engine.data.samplers.grouped import Grouped, Kind


def build(
    sizes: Sequence[int],
    batch_size: int,
    seed: int,
    options: DebiasSampling | None = None,
    names: Sequence[str] = (),
    *,
    lengths: Sequence[np.ndarray],
    answers: Sequence[np.ndarray] | None = None,
) -> Grouped:
    """A sampler over datasets of the given sizes; ``lengths[d]`` are those of dataset d's rows,
    ``answers[d]`` of their answers where these are padded apart.

    Raises UserError for less than one batch.
    """
    everything = Kind(0, [None] * len(sizes), lengths, batch_size, answers=answers)
    return Grouped(sizes, batch_size, seed, [everything], lengths, answers)
