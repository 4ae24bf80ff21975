"""What samplers have in common: their inputs, their interface, and a pool of rows in batches."""

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
    identity: str | None = None  # what the order depends on beside sizes, options and seed
    lengths_digest: str | None = None  # of the rows' lengths, where the order depends on them

    def __init__(self, inputs: SamplerInputs) -> None:
        self._sizes, self._seed = tuple(inputs.sizes), inputs.seed
        self._batch_size = inputs.batch_size

    @abstractmethod
    def batch(self, epoch: int, step: int) -> Indices:
        """The global batch as int64 ``[n, 2]`` of (dataset, row).

        Raises IndexError for a step outside the epoch.
        """

    def _check(self, step: int) -> None:
        if not 0 <= step < self.steps:
            raise IndexError(f"step {step} is outside an epoch of {self.steps} steps")


class PoolSampler(Sampler):
    """All datasets end to end, cut into batches; each row once an epoch.

    Raises UserError for less than one batch.
    """

    def __init__(self, inputs: SamplerInputs) -> None:
        super().__init__(inputs)
        self.steps = num_batches(sum(self._sizes), self._batch_size)
        self._full, self._last = cut_pool(sum(self._sizes), self._batch_size)

    def _positions(self, step: int) -> Indices:
        """Those of a step's batch in the pool."""
        self._check(step)
        start, size = step * self._batch_size, self._batch_size
        if step >= self._full:
            before = self._last[: step - self._full]
            start, size = self._full * size + sum(before), self._last[len(before)]
        return np.arange(start, start + size)


def num_batches(total: int, batch_size: int) -> int:
    """Of a pool of ``total`` rows; raises UserError where it does not fill one."""
    if total < batch_size:
        raise UserError(
            f"data.batch_size is {batch_size}, but the training data has {total} samples; "
            f"take a batch of at most {total}",
            key="data.batch_size",
        )
    return -(-total // batch_size)


def cut_pool(total: int, batch_size: int) -> tuple[int, list[int]]:
    """How many full batches a pool has, and the sizes of its last ones, which share what is left.

    A remainder of a few rows would make one batch with hardly any negatives, so that batch and the
    one before it are made about equal.
    """
    full, left = divmod(total, batch_size)
    if not (full and left):
        return full, [left] if left else []
    left += batch_size
    return full - 1, [left - left // 2, left // 2]


def split_pool(positions: Indices, sizes: Sequence[int]) -> Indices:
    """Positions in the datasets laid end to end → ``[n, 2]`` of (dataset, row)."""
    ends = np.cumsum(np.asarray(sizes, dtype=np.int64))
    datasets = np.searchsorted(ends, positions, side="right")
    starts = np.concatenate(([0], ends[:-1]))
    return np.stack((datasets, positions - starts[datasets]), axis=1)
