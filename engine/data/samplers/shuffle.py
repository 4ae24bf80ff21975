"""One pool over all datasets, in a new order each epoch."""

from __future__ import annotations

import numpy as np

from engine.data.permutation import Indices, Permutation
from engine.data.samplers.pool import PoolSampler, SamplerInputs, split_pool


def build(inputs: SamplerInputs) -> Shuffle:
    """Raises UserError for less than one batch."""
    return Shuffle(inputs)


class Shuffle(PoolSampler):
    """Each row once an epoch."""

    def batch(self, epoch: int, step: int) -> Indices:
        order = Permutation(self._spans.total, self._seed, epoch)
        return split_pool(order(np.arange(*self._spans[step])), self._sizes)
