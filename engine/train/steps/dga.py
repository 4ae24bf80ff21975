"""Decoupled gradient accumulation: the gradients of a whole batch in the memory of a sub-batch.

A contrastive loss couples all rows, so that losses of sub-batches do not add up to it. Its gradient
with respect to the rows' features does decouple them (GradCache, Gao et al. 2021, arXiv:2101.06983;
ZeroVL, Cui et al. 2022, arXiv:2112.09331):

1. features z of every sub-batch; only the last ``runner.keep_graphs`` keep their graphs;
2. the loss L of the whole batch over the detached features, and its gradients g = ∂L/∂z;
3. sub-batch by sub-batch backward of Σ⟨z, g⟩: through the kept graph, else through a new one from a
   second forward pass that draws the same random numbers.

Shared scalars (the temperature) get their gradient with the last backward, and zeros before, so
that each backward reaches the same parameters. The last is also the only one that averages
gradients over ranks. Backwards go from the last sub-batch to the first, however many graphs are
kept: rounding, and so a resumed run, does not depend on free memory. Where memory runs out in one
of the three parts, ``KeepGraphs.attempts`` runs that part again with fewer graphs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from engine.config.schema import Data, Runner
from engine.dist import collectives
from engine.dist.parallel import Parallel
from engine.train import rng
from engine.train.precision import Precision
from engine.train.steps.batches import Feed, Split, num_rows, reported
from engine.train.steps.keep_graphs import KeepGraphs
from engine.types import Batch, Features, Task

NAMES = ("clip_bsgs",)


class DecoupledAccumulation:
    """A function of a batch (on the host) and its step that leaves the whole batch's gradients.

    ``data.batch_size_train`` counts rows of all ranks.
    """

    def __init__(
        self,
        runner: Runner,
        data: Data,
        *,
        task: Task,
        model: Parallel,
        precision: Precision,
        device: torch.device,
    ) -> None:
        self.seed = runner.seed
        self.task, self.model, self.precision, self.device = task, model, precision, device
        # of a sub-batch on this rank, at most
        self.rows = -(-(data.batch_size_train or data.batch_size) // collectives.world())
        self.lockstep = collectives.world() > 1 and model.lockstep
        self.keep = KeepGraphs(runner.keep_graphs, device, self.rows)
        self.feed = Feed(device)
        self.norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]

    def __call__(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Gradients into ``.grad`` (times the fp16 scaler's scale); returns the losses.

        Raises UserError where not even one sub-batch fits the device's memory, or too little is
        left for the loss that other ranks wait in.
        """
        split = self._split(batch)
        kept: list[Features] = []  # of the last sub-batches, with their graphs

        def undo() -> None:
            kept.clear()
            self.model.zero_grad(set_to_none=True)

        alone, attempts = not self.lockstep, self.keep.attempts
        with self.model.hold():
            for attempt in attempts(undo, alone=alone):
                with attempt:
                    z = self._features(batch, split, step, kept)
            for attempt in attempts(undo, alone=collectives.world() == 1):
                with attempt:
                    losses = self._losses(z)
            for attempt in attempts(undo, alone=alone):
                with attempt:
                    self._backward(batch, split, step, z, kept)
        self.keep.finish_step()
        return reported(losses, z)

    def _features(self, batch: Batch, split: Split, step: int, kept: list[Features]) -> Features:
        """1. Features z of all sub-batches, detached; the last ones with their graphs in ``kept``.

        Idle sub-batches take part in the passes that other ranks wait for, and leave no trace.
        """
        k, own = len(split.rows), len(split.slices)
        kept_from = max(0, k - self.keep.count)
        done = []
        with restored_on_failure(self.norms):
            for j, part in enumerate(self.feed(batch, split.rows)):
                with statistics_held(self.norms if j >= own else []):
                    done.append(self._forward(part, step, j, graph=j >= kept_from))
        kept += done[kept_from:]
        return detached(done[:own], split, known=kept_from < own)

    def _losses(self, z: Features) -> dict[str, Tensor]:
        """2. The loss of the whole batch, and its gradients g = ∂L/∂z into ``z``'s ``.grad``."""
        for leaf in (*z.per_sample.values(), *z.shared.values()):
            leaf.grad = None  # of an attempt that failed
        losses = self.task.losses(z)
        self.model.scale(losses["loss"]).backward()
        return losses

    def _backward(
        self, batch: Batch, split: Split, step: int, z: Features, kept: list[Features]
    ) -> None:
        """3. Backward of Σ⟨z, g⟩ through the graphs in ``kept``, which it empties, or new ones."""
        g = {n: split.in_parts(v.grad) for n, v in z.per_sample.items() if v.grad is not None}
        g_shared = {n: v.grad for n, v in z.shared.items() if v.grad is not None}
        k, own = len(split.rows), len(split.slices)
        again = self.feed(batch, split.rows[: k - len(kept)][::-1])
        for j in reversed(range(k)):
            if kept:
                features = kept.pop()
            else:
                with statistics_held(self.norms):
                    features = self._forward(next(again), step, j, graph=True)
            pairs = [
                (value, g[name][j] if j < own else torch.zeros_like(value))
                for name, value in features.per_sample.items()
                if name in g
            ] + [
                (features.shared[name], gradient if j == 0 else torch.zeros_like(gradient))
                for name, gradient in g_shared.items()
            ]
            outputs, gradients = zip(*(p for p in pairs if p[0].requires_grad), strict=True)
            if j == 0:  # averages over the ranks
                self.keep.alone = collectives.world() == 1
                self.model.release(outputs)
            self.model.backward(outputs, gradients)
            del features, pairs, outputs

    def _forward(self, part: Batch, step: int, j: int, *, graph: bool) -> Features:
        """Features of sub-batch j. Its random numbers depend on step, rank and j, not the pass."""
        seed = rng.derive(self.seed, step, collectives.rank(), j)
        with (
            rng.isolated(seed, self.device),
            self.precision.autocast(),
            torch.set_grad_enabled(graph),
            self.keep.measured() if graph else nullcontext(),
        ):
            return self.task.features(self.model.wrapped, part)

    def _split(self, batch: Batch) -> Split:
        """This rank's sub-batches: equally many on every rank, even if their sizes are uneven.

        Where it has too few rows for that, the rest are idle if other ranks wait for each pass.
        """
        n = num_rows(batch)
        wanted = -(-max(collectives.row_counts(n)) // self.rows)
        parts = max(1, min(wanted, n))
        by_length = parts > 1 and not self.task.rows_interact
        idle = wanted - parts if self.lockstep else 0
        return Split(batch, parts, by_length=by_length, device=self.device, idle=idle)


build = DecoupledAccumulation


def detached(done: Sequence[Features], split: Split, *, known: bool) -> Features:
    """All sub-batches' features as leaves of a new graph, rows in the batch's own order.

    Where it is ``known`` from a graph, only what needs a gradient there requires one.
    """
    last = done[-1]

    def leaf(value: Tensor, source: Tensor) -> Tensor:
        wanted = source.requires_grad if known else source.is_floating_point()
        return value.detach().requires_grad_(wanted)

    return Features(
        {
            name: leaf(split.batch_order([f.per_sample[name].detach() for f in done]), source)
            for name, source in last.per_sample.items()
        },
        {name: leaf(value, value) for name, value in last.shared.items()},
        dict(last.info),
    )


@contextmanager
def restored_on_failure(norms: list[_BatchNorm]) -> Iterator[None]:
    """Batch norms get their running statistics back where the block raises."""
    before = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers()]
    try:
        yield
    except BaseException:
        for buffer, value in before:
            buffer.copy_(value)
        raise


@contextmanager
def statistics_held(norms: list[_BatchNorm]) -> Iterator[None]:
    """Batch norms normalise as always, but their running statistics stay: the rows are known."""
    tracking = [norm for norm in norms if norm.track_running_stats]
    for norm in tracking:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in tracking:
            norm.track_running_stats = True
