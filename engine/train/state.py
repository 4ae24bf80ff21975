"""All that a run must not lose: weights, optimizer, scaler, random state, position."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from engine.dist import collectives
from engine.dist.sharded import Sharded
from engine.errors import UserError
from engine.models.parameters import Row, parameter_table
from engine.train import optim, schedules
from engine.train.checkpoint import Checkpoint
from engine.train.precision import Precision
from engine.train.replicas import Replicas


@dataclass
class TrainState:
    """The moving parts of a run. ``step`` counts finished optimizer steps."""

    module: nn.Module  # as built by the task
    model: nn.Module  # the same, wrapped for the world it runs in
    parallel: Replicas | Sharded  # how weights and optimizer lie on the ranks
    optimizer: torch.optim.Optimizer
    factor: Callable[[int], float]  # the schedule: lr factor of a step
    precision: Precision
    lr: float
    grad_clip: float | None
    parameters: list[Row]  # what trains, and how
    step: int = 0
    skipped: int = 0
    seen: int = 0  # samples
    stream: list[dict[str, Any]] | None = None  # of streamed data: every rank's place in it

    def set_lr(self) -> float:
        """Put this step's learning rate into the optimizer and return it."""
        lr = self.lr * self.factor(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        return lr

    def clip(self) -> float:
        """Clip the gradients (unscaled first under fp16); returns their norm before clipping."""
        return self.parallel.clip(self.grad_clip)

    def update(self) -> None:
        """One optimizer step on the gradients that are there, which it clears."""
        self.parallel.update()

    def skip(self) -> None:
        """Leave this step's gradients unused."""
        self.parallel.skip()
        self.skipped += 1

    def capture(self, order: dict[str, Any]) -> dict[str, Any]:
        """State beside the weights, for a checkpoint (every rank must call it)."""
        random = collectives.all_gather_json(torch.get_rng_state().tolist())
        return {
            "step": self.step,
            "skipped": self.skipped,
            "seen": self.seen,
            "stream": self.stream,
            "order": order,
            "optimizer": self.parallel.optimizer_state(),
            "scaler": self.parallel.scaler_state(),
            "rng": [torch.tensor(rank, dtype=torch.uint8) for rank in random],
        }

    def restore(self, checkpoint: Checkpoint, order: dict[str, Any]) -> None:
        """Continue from ``checkpoint``. Raises UserError where this run is not its continuation."""
        saved = checkpoint.state()
        check_order(saved["order"], order, str(checkpoint.path))
        self.parallel.load(checkpoint.model(), saved["optimizer"], saved["scaler"])
        self.step, self.skipped = saved["step"], saved["skipped"]
        self.seen, self.stream = saved["seen"], saved.get("stream")
        if len(saved["rng"]) == collectives.world():
            torch.set_rng_state(saved["rng"][collectives.rank()])


def check_order(saved: dict[str, Any], now: dict[str, Any], place: str) -> None:
    """A resumed run must see the samples that are left, each once: its order may not differ."""
    differing = [
        f"{key}: {saved.get(key)!r} there, {value!r} now"
        for key, value in now.items()
        if saved.get(key) != value
    ]
    if differing:
        raise UserError(
            f"cannot resume from {place}: what the order of samples hangs on has changed\n  "
            + "\n  ".join(differing)
            + "\nset it back, or start a new run with another --exp_name"
        )


def make_state(config: Any, module: nn.Module, model: nn.Module, precision: Precision,
               total_steps: int, parameters: list[Row] | None = None) -> TrainState:  # fmt: skip
    """Optimizer and schedule for ``module``, as the configuration says.

    ``parameters`` are to be given for a model that lies in shares, which shows them no more.
    """
    parallel: Replicas | Sharded
    if isinstance(model, Sharded):  # brings its own optimizer, and its own scale of the loss
        parallel, precision = model, replace(precision, scaler=None)
    else:
        parallel = Replicas(module, optim.build(module, config.optim), precision.scaler)
    if parameters is None:
        parameters = parameter_table(module, parallel.optimizer.param_groups)
    return TrainState(
        module=module,
        model=model,
        parallel=parallel,
        optimizer=parallel.optimizer,
        factor=schedules.factor(config.optim.lr, total_steps),
        precision=precision,
        lr=config.optim.lr.init,
        grad_clip=config.optim.grad_clip,
        parameters=parameters,
    )
