"""Shards in a new order each epoch, and rows in a new order within some shards at a time.

For data whose shards are slow to read here and there: at any time only the shards of one window are
read, and each is done with before the next window begins. The first window's rows never mix with
the last one's, so a window should hold many more rows than a batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from engine.data.permutation import Indices, Permutation
from engine.data.samplers.pool import PoolSampler, SamplerInputs

NAMES = ("shards+window",)
_BLOCK_ROWS = 8192  # of a dataset that is not stored in shards


def build(inputs: SamplerInputs) -> Shards:
    """Raises UserError for less than one batch."""
    return Shards(inputs)


class Shards(PoolSampler):
    """Each row once an epoch. Memory: some 50 bytes a shard."""

    def __init__(self, inputs: SamplerInputs) -> None:
        super().__init__(inputs)
        self._window = inputs.window
        blocks = inputs.blocks() or [None] * len(inputs.sizes)
        cuts = [_cut(*each) for each in zip(inputs.sizes, blocks, strict=True)]
        self._rows = np.concatenate(cuts)  # of each shard
        self._dataset = np.repeat(np.arange(len(cuts)), [len(cut) for cut in cuts])
        # The first row of each shard in its dataset.
        self._first = np.concatenate([np.cumsum(cut) - cut for cut in cuts])
        self._order: tuple[int, Indices, Indices] | None = None

    @property
    def identity(self) -> str:
        cuts = hashlib.blake2b(self._rows.tobytes(), digest_size=8).hexdigest()
        return f"{self._window} of {len(self._rows)} ({cuts})"

    def batch(self, epoch: int, step: int) -> Indices:
        order, ends = self._order_of(epoch)
        positions = np.arange(*self._spans[step])
        windows = np.searchsorted(ends[self._window - 1 :: self._window], positions, side="right")
        for window in np.unique(windows).tolist():
            here = windows == window
            first, last = window * self._window, min((window + 1) * self._window, len(ends)) - 1
            start = int(ends[first - 1]) if first else 0
            mixed = Permutation(int(ends[last]) - start, self._seed, 5, epoch, window)
            positions[here] = mixed(positions[here] - start) + start
        places = np.searchsorted(ends, positions, side="right")
        shards = order[places]
        rows = positions - (ends[places] - self._rows[shards]) + self._first[shards]
        return np.stack((self._dataset[shards], rows), axis=1)

    def _order_of(self, epoch: int) -> tuple[Indices, Indices]:
        """The shards in an epoch's order, and the position at which each one's rows end."""
        if self._order is None or self._order[0] != epoch:
            order = Permutation(len(self._rows), self._seed, 4, epoch)(np.arange(len(self._rows)))
            self._order = epoch, order, np.cumsum(self._rows[order])
        return self._order[1:]


def _cut(size: int, blocks: Sequence[int] | np.ndarray | None) -> Indices:
    """Rows of each shard of a dataset; of one without shards, of equal parts."""
    if blocks is not None:
        return np.asarray(blocks, np.int64)
    starts = np.arange(0, size, _BLOCK_ROWS)
    return np.minimum(size - starts, _BLOCK_ROWS)
