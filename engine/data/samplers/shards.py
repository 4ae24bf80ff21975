"""Shards in a new order each epoch, and rows in a new order within some shards at a time.

For data whose shards are slow to read here and there: at any time only the shards of one window are
read, and each is done with before the next window begins. The first window's rows never mix with
the last one's, so a window should hold many more rows than a batch.
"""

import hashlib
from collections.abc import Sequence

import numpy as np

from engine.data.permutation import Indices, Permutation
from engine.data.samplers.pool import PoolSampler, SamplerInputs

NAMES = ("shards+window",)
_BLOCK_ROWS = 8192  # of a dataset that is not stored in shards


class Shards(PoolSampler):
    """Each row once an epoch. Memory: some 30 bytes a shard."""

    def __init__(self, inputs: SamplerInputs) -> None:
        super().__init__(inputs)
        self._window = inputs.window
        blocks = inputs.blocks() or [None] * len(inputs.sizes)
        cuts = [_cut(*each) for each in zip(inputs.sizes, blocks, strict=True)]
        self._rows = np.concatenate(cuts)  # of each shard
        self._dataset = np.repeat(np.arange(len(cuts)), [len(cut) for cut in cuts])
        # The first row of each shard in its dataset.
        self._first = np.concatenate([np.cumsum(cut) - cut for cut in cuts])
        digest = hashlib.blake2b(self._rows.tobytes(), digest_size=8).hexdigest()
        self.identity = f"{self._window} of {len(self._rows)} ({digest})"

    def batch(self, epoch: int, step: int) -> Indices:
        positions, number = self._positions(step), len(self._rows)
        order = Permutation(number, self._seed, 4, epoch)(np.arange(number))
        ends = np.cumsum(self._rows[order])  # position at which each shard's rows end
        windows = np.searchsorted(ends[self._window - 1 :: self._window], positions, side="right")
        for window in np.unique(windows).tolist():
            here = windows == window
            first, last = window * self._window, min((window + 1) * self._window, number) - 1
            start = int(ends[first - 1]) if first else 0
            mixed = Permutation(int(ends[last]) - start, self._seed, 5, epoch, window)
            positions[here] = mixed(positions[here] - start) + start
        places = np.searchsorted(ends, positions, side="right")
        shards = order[places]
        rows = positions - (ends[places] - self._rows[shards]) + self._first[shards]
        return np.stack((self._dataset[shards], rows), axis=1)


def _cut(size: int, blocks: Sequence[int] | np.ndarray | None) -> Indices:
    """Rows of each shard of a dataset; of one without shards, of equal parts."""
    if blocks is not None:
        return np.asarray(blocks, np.int64)
    return np.minimum(size - np.arange(0, size, _BLOCK_ROWS), _BLOCK_ROWS)


build = Shards
