"""Every step takes its whole batch from one dataset, drawn in proportion to the datasets' sizes.

Samples of one dataset resemble each other in style, so samples of a batch from one source cannot be
distinguished by the source (debiased sampling; Cui et al., ZeroVL, 2022).

What is drawn and when:

- An epoch is ``round(rows of all datasets / batch_size)`` steps. With probabilities p_d an epoch
  of S steps draws dataset d either ⌊S·p_d⌋ or ⌈S·p_d⌉ times, S·p_d on average (systematic sampling:
  one uniform offset an epoch), and a permutation decides in which step. Each step is thus drawn
  with probability p_d, without the spread of independent draws.
- The k-th draw of a dataset takes rows k·B … (k+1)·B of an endless stream of passes through it;
  every pass has its own permutation. What a pass leaves over therefore begins the next batch
  instead of being dropped: a batch may hold the end of one pass and the start of the next, and
  every pass shows every row exactly once.

All of it is computed from (seed, epoch, step), so ranks agree without communication. Only the
number of earlier draws needs counting: in closed form for whole epochs, by vectorised recomputation
inside one, with the last count kept so that the next step costs next to nothing.
"""

from __future__ import annotations

import numpy as np

from engine.data.permutation import Indices, Permutation, hash64
from engine.data.samplers.pool import Sampler, SamplerInputs
from engine.errors import UserError
from engine.registry import nearest

_CHUNK = 1 << 16  # steps counted at once; bounds memory


def build(inputs: SamplerInputs) -> Debias:
    """Raises UserError for a dataset smaller than the batch (unless repeats are allowed) and for a
    weight of a dataset that is not trained on."""
    sizes, batch_size, options = inputs.sizes, inputs.batch_size, inputs.debias
    names = tuple(inputs.names) or tuple(f"dataset {number}" for number in range(len(sizes)))
    for name, size in zip(names, sizes, strict=True):
        if size < batch_size and not (options.allow_repeats and size):
            raise UserError(
                f"data.batch_size is {batch_size}, but {name} has {size} samples, and debiased "
                f"sampling takes a whole batch from one dataset; take a batch of at most "
                f"{min(sizes)}, leave {name} out, or set data.debias.allow_repeats",
                key="data.batch_size",
            )
    for name in options.weights:
        if name not in names:
            raise UserError(
                f"data.debias.weights names {name!r}, which is not in data.train_name; "
                f"{nearest(name, list(names))}",
                key=f"data.debias.weights.{name}",
            )
    weights = np.array(
        [options.weights.get(name, size) for name, size in zip(names, sizes, strict=True)], float
    )
    # Scaled by the largest first, so that a low temperature does not overflow.
    return Debias(inputs, (weights / weights.max()) ** (1 / options.temperature))


class Debias(Sampler):
    """Global batches of one dataset each."""

    def __init__(self, inputs: SamplerInputs, weights: np.ndarray) -> None:
        self._sizes, self._seed = tuple(inputs.sizes), inputs.seed
        self._batch_size = inputs.batch_size
        self._bounds = np.cumsum(weights) / np.sum(weights)
        self.steps = max(1, round(sum(self._sizes) / self._batch_size))
        self._counted = (0, 0, np.zeros(len(self._sizes), np.int64))  # draws before (epoch, step)

    def batch(self, epoch: int, step: int) -> Indices:
        if epoch < 0 or not 0 <= step < self.steps:
            raise IndexError(f"epoch {epoch}, step {step} of {self.steps} does not exist")
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
        draws = draws.copy()
        while at_epoch < epoch:
            if at_step == 0:
                draws += np.diff(self._ends(at_epoch), prepend=0)
            else:
                draws += self._count(at_epoch, at_step, self.steps)
            at_epoch, at_step = at_epoch + 1, 0
        draws += self._count(epoch, at_step, step)
        self._counted = (epoch, step, draws)
        return draws

    def _count(self, epoch: int, first: int, end: int) -> Indices:
        draws = np.zeros(len(self._sizes), np.int64)
        for start in range(first, end, _CHUNK):
            drawn = self._drawn(epoch, start, min(start + _CHUNK, end))
            draws += np.bincount(drawn, minlength=len(draws))
        return draws
