"""Batches of images with texts or of texts alone, of similar length each (``grouped.py``).

Rows of either modality that fill not even half a batch come in one batch with some of the other's.
"""

import numpy as np

from engine.data.samplers.grouped import Grouped, Kind
from engine.data.samplers.pool import SamplerInputs, cut_pool


def build(inputs: SamplerInputs) -> Grouped:
    """Raises UserError for less than one batch."""
    texts, batch_size, total = inputs.texts(), inputs.batch_size, sum(inputs.sizes)
    alone = sum(int((own < 0).sum()) for own in texts.lengths)
    lesser, lent = min(total - alone, alone), {}
    if 0 < 2 * lesser < batch_size <= total:
        size = [batch_size, *cut_pool(total, batch_size)[1]][-1]
        lent = {lesser: lesser, total - lesser: size - lesser}
    kinds = [
        Kind(number, [_rows(own, number == 1) for own in texts.lengths], texts, inputs,
             lent.get(rows, 0))
        for number, rows in enumerate((total - alone, alone))
        if rows
    ]  # fmt: skip
    return Grouped(inputs, texts, kinds)


def _rows(lengths: np.ndarray, text_alone: bool) -> np.ndarray | None:
    """The rows of a dataset that are of a modality; None where all are."""
    of_kind = lengths < 0 if text_alone else lengths >= 0
    if of_kind.all():
        return None
    return np.flatnonzero(of_kind).astype(np.uint32 if len(lengths) < 1 << 32 else np.int64)
