"""Batches of images with texts or of texts alone, of similar length each (``grouped.py``).

Rows of either modality that fill not even half a batch come in one batch with some of the other's.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engine.data.samplers.grouped import Grouped, Kind
from engine.data.samplers.pool import SamplerInputs, Spans


def build(inputs: SamplerInputs) -> Grouped:
    """Raises UserError for less than one batch."""
    texts, batch_size = inputs.texts(), inputs.batch_size
    rows = [[_rows(own, text_alone) for own in texts.lengths] for text_alone in (False, True)]
    alone = sum(int((own < 0).sum()) for own in texts.lengths)
    totals = [sum(inputs.sizes) - alone, alone]
    lent = _lent(totals, batch_size)
    kinds = [
        Kind(number, rows[number], texts, batch_size, lent[number])
        for number in range(2)
        if totals[number]
    ]
    return Grouped(inputs, kinds, texts)


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
