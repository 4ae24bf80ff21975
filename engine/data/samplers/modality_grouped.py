"""Batches of images with texts or of texts alone, of similar length each (``grouped.py``).

Rows of either modality that fill not even half a batch come in one batch with some of the other's.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engine.config.schema import DebiasSampling
from engine.data.samplers.grouped import Grouped, Kind
from engine.data.samplers.spans import Spans


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
    negative for those without an image, ``answers[d]`` of their answers where these are padded
    apart.

    Raises UserError for less than one batch.
    """
    sides = [[_rows(length, text_alone) for length in lengths] for text_alone in (False, True)]
    totals = [
        sum(len(length if own is None else own) for own, length in zip(side, lengths, strict=True))
        for side in sides
    ]
    lent = _lent(totals, batch_size)
    kinds = [
        Kind(number, sides[number], lengths, batch_size, lent[number], answers)
        for number in range(2)
        if totals[number]
    ]
    return Grouped(sizes, batch_size, seed, kinds, lengths, answers)


def _rows(lengths: np.ndarray, text_alone: bool) -> np.ndarray | None:
    """The rows of a dataset that are of a modality; None where all are."""
    of_kind = lengths < 0 if text_alone else lengths >= 0
    if of_kind.all():
        return None
    return np.flatnonzero(of_kind).astype(np.uint32 if len(lengths) < 1 << 32 else np.int64)


def _lent(totals: Sequence[int], batch_size: int) -> list[int]:
    """How many rows of each modality are for a batch of both."""
    lesser = min(totals)
    if not 0 < 2 * lesser < batch_size or sum(totals) < batch_size:
        return [0, 0]
    spans = Spans(sum(totals), batch_size)
    first, end = spans[spans.steps - 1]
    return [total if total == lesser else end - first - lesser for total in totals]
