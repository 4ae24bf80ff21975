"""Every step takes its whole batch from one dataset, drawn in proportion to the datasets' sizes.

Samples of one dataset resemble each other in style, so samples of a batch from one source cannot be
distinguished by the source (debiased sampling; Cui et al., ZeroVL, 2022).

- An epoch is ``round(rows of all datasets / batch_size)`` steps. With probabilities p_d an epoch
  of S steps draws dataset d either ⌊S·p_d⌋ or ⌈S·p_d⌉ times, S·p_d on average (systematic sampling:
  one uniform offset an epoch), and a permutation decides in which step.
- The k-th draw of a dataset takes rows k·B … (k+1)·B of an endless stream of passes through it,
  each in its own permutation: a batch may hold the end of one pass and the start of the next, and
  every pass shows every row exactly once.

All of it is computed from (seed, epoch, step). Only the number of earlier draws needs counting: in
closed form for whole epochs, inside one by recomputation, with the last count kept for the next.
"""

import numpy as np

from engine.config.schema import DebiasSampling
from engine.data.permutation import Indices, Permutation, hash64
from engine.data.samplers.pool import Sampler, SamplerInputs
from engine.errors import UserError
from engine.registry import nearest

_CHUNK = 1 << 16  # steps counted at once; bounds memory


class Debias(Sampler):
    """Global batches of one dataset each.

    Raises UserError for a dataset smaller than the batch (unless repeats are allowed) and for a
    weight of a dataset that is not trained on.
    """

    def __init__(self, inputs: SamplerInputs) -> None:
        super().__init__(inputs)
        self.steps = max(1, round(sum(self._sizes) / self._batch_size))
        names = inputs.names or [f"dataset {number}" for number in range(len(self._sizes))]
        options, rows = inputs.debias, list(zip(names, self._sizes, strict=True))
        _check(rows, self._batch_size, options)
        weights = np.array([options.weights.get(name, size) for name, size in rows], float)
        # Scaled by the largest first, so that a low temperature does not overflow.
        weights = (weights / weights.max()) ** (1 / options.temperature)
        self._bounds = np.cumsum(weights) / np.sum(weights)
        self._counted = (0, 0, np.zeros(len(self._sizes), np.int64))  # draws before (epoch, step)

    def batch(self, epoch: int, step: int) -> Indices:
        self._check(step)
        dataset = int(self._drawn(epoch, step, step + 1)[0])
        first = int(self._draws_before(epoch, step)[dataset]) * self._batch_size
        passes, places = np.divmod(np.arange(first, first + self._batch_size), self._sizes[dataset])
        rows = np.empty((self._batch_size, 2), np.int64)
        rows[:, 0] = dataset
        for number in np.unique(passes):
            here = passes == number
            order = Permutation(self._sizes[dataset], self._seed, 1, dataset, int(number))
            rows[here, 1] = order(places[here])
        return rows

    def _ends(self, epoch: int) -> Indices:
        """Where in an epoch's unpermuted list of draws each dataset's share ends."""
        offset = hash64(self._seed, 2, epoch) / 2**64
        ends = np.ceil(self.steps * self._bounds - offset).astype(np.int64)
        ends = np.clip(ends, 0, self.steps)
        ends[-1] = self.steps  # rounding of the bounds must not lose the last draw
        return ends

    def _drawn(self, epoch: int, first: int, end: int) -> Indices:
        """The dataset of each step from ``first`` up to ``end``."""
        order = Permutation(self.steps, self._seed, 3, epoch)
        return np.searchsorted(self._ends(epoch), order(np.arange(first, end)), side="right")

    def _draws_before(self, epoch: int, step: int) -> Indices:
        """How often each dataset was drawn before a step, in all epochs."""
        at_epoch, at_step, draws = self._counted
        if (at_epoch, at_step) > (epoch, step):
            at_epoch, at_step, draws = 0, 0, np.zeros_like(draws)
        while at_epoch < epoch:
            draws = draws + self._count(at_epoch, at_step, self.steps)
            at_epoch, at_step = at_epoch + 1, 0
        draws = draws + self._count(epoch, at_step, step)
        self._counted = (epoch, step, draws)
        return draws

    def _count(self, epoch: int, first: int, end: int) -> Indices:
        if (first, end) == (0, self.steps):
            return np.diff(self._ends(epoch), prepend=0)
        draws = np.zeros(len(self._sizes), np.int64)
        for start in range(first, end, _CHUNK):
            drawn = self._drawn(epoch, start, min(start + _CHUNK, end))
            draws += np.bincount(drawn, minlength=len(draws))
        return draws


def _check(rows: list[tuple[str, int]], batch_size: int, options: DebiasSampling) -> None:
    for name, size in rows:
        if size < batch_size and not (options.allow_repeats and size):
            raise UserError(
                f"data.batch_size is {batch_size}, but {name} has {size} samples, and debiased "
                "sampling takes a whole batch from one dataset; take a batch of at most "
                f"{min(n for _, n in rows)}, leave {name} out, or set data.debias.allow_repeats",
                key="data.batch_size",
            )
    names = [name for name, _ in rows]
    for name in options.weights:
        if name not in names:
            raise UserError(
                f"data.debias.weights names {name!r}, which is not in data.train_name; "
                f"{nearest(name, names)}",
                key=f"data.debias.weights.{name}",
            )


build = Debias
