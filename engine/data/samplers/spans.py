"""How a pool of rows is cut into batches, and how a batch's positions become rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engine.data.permutation import Indices
from engine.errors import UserError


class Spans:
    """Batches of a pool of ``total`` rows: all of one size, but the last two share what is left.

    A remainder of a few rows would make one batch with hardly any negatives, so that batch and the
    one before it are made about equal: no batch is smaller than half of ``batch_size``.
    Raises UserError where the pool does not fill one batch.
    """

    def __init__(self, total: int, batch_size: int) -> None:
        if total < batch_size:
            raise UserError(
                f"data.batch_size is {batch_size}, but the training data has {total} samples; "
                f"take a batch of at most {total}",
                key="data.batch_size",
            )
        self.total, self.batch_size = total, batch_size
        self.steps = -(-total // batch_size)

    def __getitem__(self, step: int) -> tuple[int, int]:
        """First and past-the-last position of a step's batch in the pool."""
        if not 0 <= step < self.steps:
            raise IndexError(f"step {step} is outside an epoch of {self.steps} steps")
        start = step * self.batch_size
        if self.total % self.batch_size == 0 or step < self.steps - 2:
            return start, start + self.batch_size
        shared = (self.steps - 2) * self.batch_size
        middle = shared + -(-(self.total - shared) // 2)
        return (shared, middle) if step == self.steps - 2 else (middle, self.total)


def split_pool(positions: Indices, sizes: Sequence[int]) -> Indices:
    """Positions in the datasets laid end to end → ``[n, 2]`` of (dataset, row)."""
    ends = np.cumsum(np.asarray(sizes, dtype=np.int64))
    datasets = np.searchsorted(ends, positions, side="right")
    starts = np.concatenate(([0], ends[:-1]))
    return np.stack((datasets, positions - starts[datasets]), axis=1)
