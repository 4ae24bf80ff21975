"""What samplers have in common: their inputs, their interface, and a pool of rows in batches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from engine.config.schema import DebiasSampling
from engine.data.permutation import Indices
from engine.errors import UserError


class TextLengths(NamedTuple):
    """How long the texts of all rows are: an int32 array a dataset."""

    lengths: Sequence[np.ndarray]  # negative for rows without an image
    answers: Sequence[np.ndarray] | None = None  # their part of it, where answers are padded apart


def _unknown() -> TextLengths:
    raise LookupError("the lengths of the texts are not known")


@dataclass(frozen=True)
class SamplerInputs:
    """What every sampler is built from.

    ``blocks`` and ``texts`` take a pass over the data, and are called by samplers that need them.
    """

    sizes: Sequence[int]  # rows of each dataset
    batch_size: int  # global
    seed: int
    names: Sequence[str] = ()  # of the datasets
    debias: DebiasSampling = field(default_factory=DebiasSampling)
    window: int = 16  # shards mixed at a time
    # Rows of each shard of a dataset; None for a dataset that is not stored in shards.
    blocks: Callable[[], Sequence[Sequence[int] | np.ndarray | None]] = tuple
    texts: Callable[[], TextLengths] = _unknown


class Sampler(ABC):
    """Global batches as a pure function of (seed, epoch, step)."""

    steps: int  # batches in an epoch, the same in every epoch

    @abstractmethod
    def batch(self, epoch: int, step: int) -> Indices:
        """The global batch as int64 ``[n, 2]`` of (dataset, row).

        Raises IndexError for a step outside the epoch.
        """

    @property
    def identity(self) -> str | None:
        """Equal for samplers with the same order, where sizes and seed are equal."""
        return None

    @property
    def lengths_digest(self) -> str | None:
        """Equal for samplers over rows of the same lengths, where these decide the order."""
        return None


class PoolSampler(Sampler):
    """All datasets end to end, cut into batches; each row once an epoch.

    Raises UserError for less than one batch.
    """

    def __init__(self, inputs: SamplerInputs) -> None:
        self._sizes, self._seed = tuple(inputs.sizes), inputs.seed
        self._spans = Spans(sum(inputs.sizes), inputs.batch_size)
        self.steps = self._spans.steps


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
