"""The plain case: every rank has the whole model and optimizer (torch's DDP, or alone)."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from engine.models.weights import load_model
from engine.train import optim


@dataclass
class Replicas:
    """What ``engine.dist.sharded`` asks, of a model that is whole everywhere."""

    module: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler | None = None

    def __post_init__(self) -> None:
        self._trained = [p for p in self.module.parameters() if p.requires_grad]

    @property
    def scales_loss(self) -> bool:
        return self.scaler is not None

    def clip(self, max_norm: float | None) -> float:
        """Clip the gradients (unscaled first under fp16); returns their norm before clipping."""
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        return optim.clip_gradients(self._trained, max_norm)

    def update(self) -> None:
        """One optimizer step on the gradients that are there, which it clears."""
        if self.scaler is None:
            self.optimizer.step()
        else:  # leaves the weights alone on an overflow, and lowers its scale
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        constrain(self.module)

    def skip(self) -> None:
        """Leave this step's gradients unused."""
        if self.scaler is not None:
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def weights(self) -> dict[str, Tensor]:
        return self.module.state_dict()

    def optimizer_state(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def scaler_state(self) -> dict[str, Any] | None:
        return None if self.scaler is None else self.scaler.state_dict()

    def load(
        self,
        weights: Mapping[str, Tensor],
        optimizer: Mapping[str, Any],
        scaler: Mapping[str, Any] | None,
    ) -> None:
        """Raises UserError where the weights do not fit."""
        load_model(self.module, weights, key="ckpt.resume")
        self.optimizer.load_state_dict(dict(optimizer))
        if self.scaler is not None and scaler is not None:
            self.scaler.load_state_dict(dict(scaler))

    def whole(self) -> AbstractContextManager[None]:
        return nullcontext()


def constrain(module: nn.Module) -> None:
    """Let a model clamp what it keeps in bounds (a temperature, say) after an update."""
    clamp = getattr(module, "constrain", None)
    if callable(clamp):
        clamp()
