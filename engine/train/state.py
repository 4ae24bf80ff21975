"""All that a run must not lose: weights, optimizer, scaler, random state, position."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from engine.dist import collectives
from engine.errors import UserError
from engine.train import optim, schedules
from engine.train.checkpoint import Checkpoint, load_model
from engine.train.precision import Precision


@dataclass
class TrainState:
    """The moving parts of a run. ``step`` counts finished optimizer steps."""

    module: nn.Module  # as built by the task
    model: nn.Module  # the same, wrapped for the world it runs in
    trained: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    factor: Callable[[int], float]  # the schedule: lr factor of a step
    precision: Precision
    lr: float
    grad_clip: float | None
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
        if self.precision.scaler is not None:
            self.precision.scaler.unscale_(self.optimizer)
        return optim.clip_gradients(self.trained, self.grad_clip)

    def update(self) -> None:
        """One optimizer step on the gradients that are there, which it clears."""
        scaler = self.precision.scaler
        if scaler is None:
            self.optimizer.step()
        else:  # leaves the weights alone on an overflow, and lowers its scale
            scaler.step(self.optimizer)
            scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        constrain(self.module)

    def skip(self) -> None:
        """Leave this step's gradients unused."""
        if self.precision.scaler is not None:
            self.precision.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.skipped += 1

    def capture(self, order: dict[str, Any]) -> dict[str, Any]:
        """State beside the weights, for a checkpoint (every rank must call it)."""
        random = collectives.all_gather_json(torch.get_rng_state().tolist())
        scaler = self.precision.scaler
        return {
            "step": self.step,
            "skipped": self.skipped,
            "seen": self.seen,
            "stream": self.stream,
            "order": order,
            "optimizer": self.optimizer.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else None,
            "rng": [torch.tensor(rank, dtype=torch.uint8) for rank in random],
        }

    def restore(self, checkpoint: Checkpoint, order: dict[str, Any]) -> None:
        """Continue from ``checkpoint``. Raises UserError where this run is not its continuation."""
        saved = checkpoint.state()
        check_order(saved["order"], order, str(checkpoint.path))
        load_model(self.module, checkpoint.model(), key="ckpt.resume")
        self.optimizer.load_state_dict(saved["optimizer"])
        if self.precision.scaler is not None and saved["scaler"] is not None:
            self.precision.scaler.load_state_dict(saved["scaler"])
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


def constrain(module: nn.Module) -> None:
    """Let a model clamp what it keeps in bounds (a temperature, say) after an update."""
    clamp = getattr(module, "constrain", None)
    if callable(clamp):
        clamp()


def make_state(config: Any, module: nn.Module, model: nn.Module, precision: Precision,
               total_steps: int) -> TrainState:  # fmt: skip
    """Optimizer and schedule for ``module``, as the configuration says."""
    return TrainState(
        module=module,
        model=model,
        trained=[parameter for parameter in module.parameters() if parameter.requires_grad],
        optimizer=optim.build(module, config.optim),
        factor=schedules.factor(config.optim.lr, total_steps),
        precision=precision,
        lr=config.optim.lr.init,
        grad_clip=config.optim.grad_clip,
    )
