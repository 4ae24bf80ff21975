"""One pool over all datasets, in a new order each epoch."""

from engine.data.permutation import Indices, Permutation
from engine.data.samplers.pool import PoolSampler, split_pool


class Shuffle(PoolSampler):
    """Each row once an epoch."""

    def batch(self, epoch: int, step: int) -> Indices:
        order = Permutation(sum(self._sizes), self._seed, epoch)
        return split_pool(order(self._positions(step)), self._sizes)


build = Shuffle
