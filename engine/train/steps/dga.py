"""Decoupled gradient accumulation: the gradients of a whole batch in the memory of a sub-batch.

A contrastive loss couples all rows, so that losses of sub-batches do not add up to it. Its gradient
with respect to the rows' features does decouple them (GradCache, Gao et al. 2021, arXiv:2101.06983;
ZeroVL, Cui et al. 2022, arXiv:2112.09331):

1. features z of every sub-batch; only the last ``runner.keep_graphs`` keep their graphs;
2. the loss of the whole batch over the detached features, and its gradients g = ∂L/∂z;
3. sub-batch by sub-batch backward of Σ⟨z, g⟩: through the kept graph, else through a new one from a
   second forward pass that draws the same random numbers.

Shared scalars (the temperature) get their gradient with the last backward, and zeros before, so
that each backward reaches the same parameters. The last is also the only one that averages
gradients over ranks. Backwards go from the last sub-batch to the first, however many graphs are
kept: rounding, and so a resumed run, does not hang on free memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from engine.config.schema import Data, Runner
from engine.dist import collectives, reduction
from engine.errors import UserError
from engine.train import rng
from engine.train.precision import Precision
from engine.train.steps.batches import Feed, Split, num_rows, numbers
from engine.train.steps.keep_graphs import KeepGraphs, out_of_memory
from engine.types import Batch, Features, Task

NAMES = ("clip_bsgs",)


class DecoupledAccumulation:
    """A function of a batch (on the host) and its step that leaves the whole batch's gradients."""

    def __init__(
        self,
        runner: Runner,
        rows: int,
        *,
        task: Task,
        model: nn.Module,
        precision: Precision,
        device: torch.device,
    ) -> None:
        self.seed = runner.seed
        self.rows = rows  # of a sub-batch on this rank, at most
        self.task, self.model, self.precision, self.device = task, model, precision, device
        self.lockstep = collectives.world() > 1 and reduction.lockstep(model)
        self.keep = KeepGraphs(runner.keep_graphs, device)
        self.feed = Feed(device)
        self.norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]

    def __call__(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Gradients into ``.grad`` (times the fp16 scaler's scale); returns the losses.

        Where memory runs out, fewer graphs are kept. Raises UserError where not even one sub-batch
        fits the device's memory, or too little is left for the loss that other ranks wait in.
        """
        split = self._split(batch)
        statistics = [(b, b.clone()) for norm in self.norms for b in norm.buffers()]
        while True:
            self._others_wait = self.lockstep
            try:
                losses = self.gradients(batch, split, step)
                break
            except (RuntimeError, MemoryError) as error:
                failure = self._out_of_memory(error)
            self._keep_fewer(failure)
            for buffer, value in statistics:
                buffer.copy_(value)
        self.keep.finish_step()
        return losses

    def _out_of_memory(self, error: BaseException) -> str:
        """What it says; anything else, or what cannot be tried again, is raised.

        Not kept is the error itself: its traceback holds the graphs.
        """
        if not out_of_memory(error):
            raise error
        if self._others_wait:
            raise UserError(
                f"memory ran out where other ranks wait, with the graphs of {self.keep.count} "
                f"sub-batches kept: lower runner.keep_graphs or data.batch_size ({error})",
                key="runner.keep_graphs",
            ) from error
        return str(error)

    def _keep_fewer(self, failure: str) -> None:
        """Begin the gradients anew with fewer graphs kept."""
        if not self.keep.fall_back():
            raise UserError(
                f"a sub-batch of {self.rows} rows a device does not fit into memory: lower "
                f"data.batch_size_train ({failure})",
                key="data.batch_size_train",
            )
        self.model.zero_grad(set_to_none=True)

    def gradients(self, batch: Batch, split: Split, step: int) -> dict[str, Tensor]:
        """The algorithm."""
        k, own = len(split.rows), len(split.slices)
        kept_from = max(0, k - self.keep.count)
        with reduction.hold(self.model):
            # 1. Features of all sub-batches, graphs of the last ones
            done = []
            for j, part in enumerate(self.feed(batch, split.rows)):
                with statistics_held(self.norms if j >= own else []):
                    done.append(self._forward(part, step, j, graph=j >= kept_from))
            whole = detached(done[:own], split, known=kept_from < own)
            kept, done = done[kept_from:], []

            # 2. The whole batch's loss, and its gradients at the features
            self._others_wait = collectives.world() > 1
            losses = self.task.losses(whole)
            self.precision.scale(losses["loss"]).backward()
            pulls = {name: split.in_parts(g) for name, g in _gradients(whole.per_sample)}
            once = dict(_gradients(whole.shared))

            # 3. On to the parameters; up to the last backward each rank may try again alone
            self._others_wait = self.lockstep
            while True:
                try:
                    self._backward(batch, split, step, kept, pulls, once)
                    break
                except (RuntimeError, MemoryError) as error:
                    failure = self._out_of_memory(error)
                kept.clear()
                self._keep_fewer(failure)
        return numbers(losses, whole)

    def _backward(
        self,
        batch: Batch,
        split: Split,
        step: int,
        kept: list[Features],
        pulls: dict[str, list[Tensor]],
        once: dict[str, Tensor],
    ) -> None:
        """Gradients at the features on to the parameters, from the last sub-batch to the first.

        ``kept`` are the last sub-batches' features with their graphs, and is emptied on the way.
        """
        k = len(split.rows)
        again = self.feed(batch, split.rows[: k - len(kept)][::-1])
        for j in reversed(range(k)):
            if kept:
                features = kept.pop()
            else:
                with statistics_held(self.norms):
                    features = self._forward(next(again), step, j, graph=True)
            found = {name: features.per_sample[name] for name in pulls}
            if j < len(split.slices):
                ends = [(z, pulls[name][j]) for name, z in found.items()]
            else:
                ends = [(z, torch.zeros_like(z)) for z in found.values()]
            for name, pull in once.items():
                ends.append((features.shared[name], pull if j == 0 else torch.zeros_like(pull)))
            outputs, gradients = zip(*(e for e in ends if e[0].requires_grad), strict=True)
            if j == 0:
                self._others_wait = collectives.world() > 1
                reduction.release(self.model, outputs)
            reduction.backward(self.model, outputs, gradients)
            del features, ends, outputs

    def _forward(self, part: Batch, step: int, j: int, *, graph: bool) -> Features:
        """Features of sub-batch j; its random numbers hang on step, rank and j, not on the pass."""
        seed = rng.derive(self.seed, step, collectives.rank(), j)
        with (
            rng.isolated(seed, self.device),
            self.precision.autocast(),
            torch.set_grad_enabled(graph),
        ):
            if not graph:
                return self.task.features(self.model, part)
            with self.keep.measured():
                return self.task.features(self.model, part)

    def _split(self, batch: Batch) -> Split:
        """This rank's sub-batches: of uneven sizes if must be, but equally many on every rank.

        Where it has too few rows for that the rest are idle, if other ranks wait for each pass.
        """
        n = num_rows(batch)
        wanted = -(-max(collectives.row_counts(n)) // self.rows)
        parts = max(1, min(wanted, n))
        by_length = parts > 1 and not self.task.rows_interact
        idle = wanted - parts if self.lockstep else 0
        return Split(batch, parts, by_length=by_length, device=self.device, idle=idle)


def build(
    runner: Runner,
    data: Data,
    *,
    task: Task,
    model: nn.Module,
    precision: Precision,
    device: torch.device,
) -> DecoupledAccumulation:
    """The step of ``runner.name: dga``; ``data.batch_size_train`` counts rows of all ranks."""
    rows = -(-(data.batch_size_train or data.batch_size) // collectives.world())
    return DecoupledAccumulation(
        runner, rows, task=task, model=model, precision=precision, device=device
    )


def detached(done: Sequence[Features], split: Split, *, known: bool) -> Features:
    """All sub-batches' features as leaves of a new graph, rows in the batch's own order.

    Where it is ``known`` from a graph, only what needs a gradient there asks for one.
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


def _gradients(leaves: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    return ((name, z.grad) for name, z in leaves.items() if z.grad is not None)


@contextmanager
def statistics_held(norms: list[_BatchNorm]) -> Iterator[None]:
    """Batch norms normalise as ever, but their running statistics stay: the rows are known."""
    tracking = [norm for norm in norms if norm.track_running_stats]
    for norm in tracking:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in tracking:
            norm.track_running_stats = True
