"""All that a run must not lose: weights, optimizer, scaler, random state, position."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import nn

from engine import registry
from engine.config.schema import Config, Optim
from engine.dist import collectives
from engine.dist.ddp import Replicas
from engine.dist.parallel import Parallel
from engine.errors import UserError
from engine.models.parameters import Row, parameter_table
from engine.models.weights import load_model
from engine.train import optim, schedules
from engine.train.checkpoint import Checkpoint
from engine.train.precision import Precision


@dataclass
class TrainState:
    """The moving parts of a run. ``step`` counts finished optimizer steps."""

    config: Optim
    parallel: Parallel  # the model and its optimizer, as the ranks hold them
    factor: Callable[[int], float]  # the schedule: lr factor of a step
    precision: Precision
    parameters: list[Row]  # what trains, and how
    step: int = 0
    skipped: int = 0
    seen: int = 0  # samples
    stream: list[dict[str, Any]] | None = None  # of streamed data: every rank's place in it

    @property
    def module(self) -> nn.Module:
        """The model as the task built it."""
        return self.parallel.module

    def set_lr(self) -> float:
        """Put this step's learning rate into the optimizer and return it."""
        lr = self.config.lr.init * self.factor(self.step)
        for group in self.parallel.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        return lr

    def clip(self) -> float:
        """Clip the gradients (unscaled first under fp16); returns their norm before clipping."""
        return self.parallel.clip(self.config.grad_clip)

    def skip(self) -> None:
        """Drop this step's gradients."""
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
        """Continue from ``checkpoint``, with whose weights the state was built.

        Raises UserError where this run is not its continuation: it must see the samples that are
        left, each once, so that their order may not differ.
        """
        saved = checkpoint.state()
        differing = [
            f"{key}: {saved['order'].get(key)!r} there, {value!r} now"
            for key, value in order.items()
            if saved["order"].get(key) != value
        ]
        if differing:
            raise UserError(
                f"cannot resume from {checkpoint.path}: what the order of samples depends on has "
                "changed\n  "
                + "\n  ".join(differing)
                + "\nset it back, or start a new run with another --exp_name"
            )
        self.parallel.load(saved["optimizer"], saved["scaler"], checkpoint.model)
        self.step, self.skipped = saved["step"], saved["skipped"]
        self.seen, self.stream = saved["seen"], saved.get("stream")
        if len(saved["rng"]) == collectives.world():
            torch.set_rng_state(saved["rng"][collectives.rank()])


def build_state(
    config: Config,
    module: nn.Module,
    strategy: ModuleType | None,
    device: torch.device,
    precision: Precision,
    total_steps: int,
    checkpoint: Checkpoint | None = None,
) -> TrainState:
    """Optimizer and schedule for ``module``, held as ``strategy`` (a file of engine/dist) says.

    Without one the module stays as it is, to be inspected. It gets the weights of ``checkpoint``
    while they are still whole.
    """
    module.train()
    if checkpoint is not None:
        checkpoint.need_state()
        load_model(module, checkpoint.model(), key="ckpt.resume")
    optimizer = optim.build(module, config.optim)  # freezes, before a wrapper sees what trains
    parameters = parameter_table(module, optimizer.param_groups)
    if strategy is None:
        parallel: Parallel = Replicas(module, optimizer)
    else:
        own = registry.options_of(strategy, config.options)
        parallel = strategy.build(module, optimizer, config, device, precision.name, **own)
    factor = schedules.factor(config.optim.lr, total_steps)
    return TrainState(config.optim, parallel, factor, precision, parameters)
