"""One pool over all datasets, in a new order each epoch."""

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
) -> Shuffle:
    """A sampler over datasets of the given sizes. Raises UserError for less than one batch."""
    return Shuffle(sizes, batch_size, seed)


class Shuffle:
    """Global batches as a pure function of (seed, epoch, step); each row once an epoch."""

    def __init__(self, sizes: Sequence[int], batch_size: int, seed: int) -> None:
        self._sizes, self._seed = tuple(sizes), seed
        self._spans = Spans(sum(sizes), batch_size)

    def steps(self, epoch: int) -> int:
        """Batches in an epoch, every one the same number."""
        return self._spans.steps

    def batch(self, epoch: int, step: int) -> Indices:
        """The global batch as int64 ``[n, 2]`` of (dataset, row)."""
        first, end = self._spans[step]
        order = Permutation(self._spans.total, self._seed, epoch)
        return split_pool(order(np.arange(first, end)), self._sizes)
