"""Dataset after dataset in the order of ``train_name``, each in a new order every epoch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engine.config.schema import DebiasSampling
from engine.data.permutation import Indices, Permutation
from engine.data.samplers.spans import Spans, split_pool


def build(
    sizes: Sequence[int],
    batch_size: int,
    seed: int,
    options: DebiasSampling | None = None,
    names: Sequence[str] = (),
) -> Sequential:
    """A sampler over datasets of the given sizes. Raises UserError for less than one batch."""
    return Sequential(sizes, batch_size, seed)


class Sequential:
    """Global batches as a pure function of (seed, epoch, step); each row once an epoch.

    The batch in which one dataset ends is filled up from the next, so that all rows are shown and
    no batch is small.
    """

    def __init__(self, sizes: Sequence[int], batch_size: int, seed: int) -> None:
        self._sizes, self._seed = tuple(sizes), seed
        self._spans = Spans(sum(sizes), batch_size)

    def steps(self, epoch: int) -> int:
        """Batches in an epoch, every one the same number."""
        return self._spans.steps

    def batch(self, epoch: int, step: int) -> Indices:
        """The global batch as int64 ``[n, 2]`` of (dataset, row)."""
        rows = split_pool(np.arange(*self._spans[step]), self._sizes)
        for dataset in np.unique(rows[:, 0]):
            here = rows[:, 0] == dataset
            order = Permutation(self._sizes[dataset], self._seed, epoch, int(dataset))
            rows[here, 1] = order(rows[here, 1])
        return rows
