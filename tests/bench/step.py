"""The engine's whole step beside its encoders alone.

    python -m tests.bench step [--data FOLDER] [--threads N]

Ours is one turn of the training loop on a batch that is there: features, loss, backward, clipping,
update, the ranks' agreement, and the row in every log. The limit is forward and backward of the
same encoders on the same batch and the same optimizer's step, nothing else. Both take turns inside
one loop, A B B A.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import engine.torchvision_ops  # noqa: F401
from engine.train.loop import Training
from engine.types import Batch, Metrics
from tests.bench.runs import configuration, make_run, make_training, settings
from tests.bench.table import Line, Options
from tests.bench.timing import ratio

Seconds = tuple[float, float]  # of the processor, of the wall clock


class Alternating(Training):
    """The loop, fed the same batch over and over; between two of its steps the bare encoders run.

    The loop asks for a batch when it is done with the one before, logs included, so that a step
    lasts from handing out a batch to being asked for the next.
    """

    rounds = 1
    given: Batch
    bare: Callable[[], None]
    seconds: dict[str, list[Seconds]]

    def _batches(self) -> Iterator[tuple[int, Batch, list[Any]]]:
        step, self.seconds = 0, {"bare": [], "ours": []}
        for number in range(-2, 2 * self.rounds):  # two to warm up
            for name in ("bare", "ours")[:: 1 if number % 2 else -1]:
                start = time.process_time(), time.perf_counter()
                if name == "bare":
                    self.bare()
                else:
                    yield step, dict(self.given), []
                    step += 1
                if number >= 0:
                    now = time.process_time(), time.perf_counter()
                    self.seconds[name].append((now[0] - start[0], now[1] - start[1]))

    def save(self, metrics: Metrics) -> None:
        """Nothing: a checkpoint is no part of a step."""


def bare_encoders(training: Training, batch: Batch) -> Callable[[], None]:
    """Forward and backward of the encoders, and the optimizer's step."""
    state = training.state
    width = training.config.model.projection.dim
    rows = len(batch["image_BCHW"])
    pull = torch.randn(rows, width, generator=torch.Generator().manual_seed(0)) / rows

    def work() -> None:
        with state.precision.autocast():
            outputs = state.parallel(batch)
        torch.autograd.backward([outputs["image_BD"], outputs["text_BD"]], [pull, pull])
        state.parallel.optimizer.step()
        state.parallel.optimizer.zero_grad(set_to_none=True)

    return work


def assert_equal(training: Training, batch: Batch) -> None:
    """The step's loss and gradients are those of plain torch operations, to 1e-4 (fp32)."""
    module = training.state.module
    losses = training._build_step()({**batch, "step": 0}, 0)
    found = {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    outputs = module(batch)
    logits = outputs["logit_scale"].exp() * outputs["image_BD"] @ outputs["text_BD"].T
    target = torch.arange(len(logits))
    loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    loss.backward()
    torch.testing.assert_close(losses["loss"], loss.detach(), rtol=1e-4, atol=1e-5)
    for name, parameter in module.named_parameters():
        want = parameter.grad
        if want is not None:
            error = (found[name] - want).norm()
            assert error <= 1e-4 * want.norm() + 1e-6, (name, float(error))
    module.zero_grad()


def rows(options: Options) -> Iterator[Line]:
    """Processor time and wall time of the encoders ÷ those of the whole step."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path, values = settings(options, folder)
        values |= {
            "epoch": 10_000,  # no end of the schedule is near
            "optim.lr.init": 1e-9,  # weights stay what they are, at the same cost
            "dist.precision": "fp32",
            "data.num_workers": 0,
        }
        training = make_training(Alternating, make_run(configuration(path, values)), folder / "run")
        _, batch, _ = next(iter(Training._batches(training)))
        batch["step"] = 0
        assert_equal(training, batch)
        training.given, training.rounds = batch, 1 if options.quick else 2 * options.repeats
        training.bare = bare_encoders(training, batch)
        with training.log:
            training.run()
    for place, what in enumerate(("processor time", "wall time")):
        bare, ours = ([x[place] for x in training.seconds[n]] for n in ("bare", "ours"))
        yield Line(
            f"encoders ÷ step, {what}",
            limit=1e3 * statistics.median(bare),
            ours=1e3 * statistics.median(ours),
            mark="≥ 0.97",
            unit="ms",
            **ratio(bare, ours),  # within a round, where other load is alike
        )
