"""Which rows of a step, or of a set, are a rank's."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from engine.data.permutation import Indices


class Sampler(Protocol):
    """Global batches as a pure function of (epoch, step)."""

    def batch(self, epoch: int, step: int) -> Indices: ...


def rank_slice(batch: Any, rank: int, world: int) -> Any:
    """A rank's contiguous share of a global batch; the first n % world ranks get one row more."""
    share, more = divmod(len(batch), world)
    first = rank * share + min(rank, more)
    return batch[first : first + share + (rank < more)]


class TrainRows:
    """Step of the run → (epoch, this rank's rows of it)."""

    def __init__(self, sampler: Sampler, steps_per_epoch: int, rank: int, world: int) -> None:
        self.sampler, self.steps_per_epoch = sampler, steps_per_epoch
        self.rank, self.world = rank, world

    def __call__(self, step: int) -> tuple[int, Indices]:
        epoch, within = divmod(step, self.steps_per_epoch)
        return epoch, rank_slice(self.sampler.batch(epoch, within), self.rank, self.world)

    def others(self, step: int) -> Indices:
        """The step's rows of all other ranks."""
        batch = self.sampler.batch(*divmod(step, self.steps_per_epoch))
        own = rank_slice(np.arange(len(batch)), self.rank, self.world)
        return np.delete(batch, own, axis=0)


class ValidRows:
    """Batch number → (epoch 0, rows of it)."""

    def __init__(self, rows: Indices, dataset: int, batch_size: int) -> None:
        self.rows, self.dataset, self.batch_size = rows, dataset, batch_size

    def __call__(self, number: int) -> tuple[int, Indices]:
        rows = self.rows[number * self.batch_size : (number + 1) * self.batch_size]
        return 0, np.stack((np.full_like(rows, self.dataset), rows), axis=1)
