"""Dataset after dataset in the order of ``train_name``, each in a new order every epoch."""

import numpy as np

from engine.data.permutation import Indices, Permutation
from engine.data.samplers.pool import PoolSampler, split_pool


class Sequential(PoolSampler):
    """Each row once an epoch.

    The batch in which one dataset ends is filled up from the next, so that all rows are shown and
    no batch is small.
    """

    def batch(self, epoch: int, step: int) -> Indices:
        rows = split_pool(self._positions(step), self._sizes)
        for dataset in np.unique(rows[:, 0]):
            here = rows[:, 0] == dataset
            order = Permutation(self._sizes[dataset], self._seed, epoch, int(dataset))
            rows[here, 1] = order(rows[here, 1])
        return rows


build = Sequential
