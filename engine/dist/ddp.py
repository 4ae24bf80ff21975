"""Data parallelism by torch's DDP: a replica on each rank, gradients averaged in backward."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from pydantic import PositiveFloat
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from engine.config.explain import validated
from engine.config.schema import Config
from engine.config.section import Section
from engine.dist import collectives
from engine.dist.parallel import Bytes, Parallel, State, Weights, constrain

NAMES = ("torch",)
SHARDS = False


class Param(Section):
    """``dist.param`` of ``dist.name: torch``, passed to DDP."""

    bucket_cap_mb: PositiveFloat | None = None  # default: DDP's own
    find_unused_parameters: bool = False
    gradient_as_bucket_view: bool = True


def check(config: Config, device: torch.device, precision: str) -> None:
    """Raises UserError for ``dist.param`` that is not of ``Param``."""
    validated(Param, config.dist.param, "dist.param")


def device_bytes(config: Config, precision: str, world: int, whole: Bytes) -> Bytes:
    """Every device holds all of it."""
    return whole


def build(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: Config,
    device: torch.device,
    precision: str,
) -> Replicas:
    """``module`` on ``device``, wrapped where there is more than one rank."""
    wrapped = module.to(device)
    param = validated(Param, config.dist.param, "dist.param")
    if collectives.world() > 1 and any(p.requires_grad for p in module.parameters()):
        # Without running statistics no buffer ever changes: do not send them every step
        running = any(isinstance(m, _BatchNorm) and m.track_running_stats for m in module.modules())
        options = param.model_dump(exclude_none=True)
        wrapped = DistributedDataParallel(module, forward_sync_buffers=running, **options)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    return Replicas(module, optimizer, wrapped, scaler)


class Replicas(Parallel):
    """Every rank has the whole model and optimizer; ``wrapped`` is the module, or DDP around it."""

    copies = False

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        wrapped: nn.Module | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        super().__init__()
        self.module, self.wrapped, self.optimizer = module, wrapped or module, optimizer
        self.scaler = scaler or torch.amp.GradScaler(enabled=False)
        self.scales_loss = self.scaler.is_enabled()
        self.trained = [p for p in module.parameters() if p.requires_grad]

    def hold(self) -> AbstractContextManager[None]:
        """DDP arms its reduction in forward and reduces in whichever backward comes next.

        A step of many forwards and backwards holds it back and releases it right before the last
        one, so that the ranks communicate once a step and backwards may come in any order.
        """
        if isinstance(self.wrapped, DistributedDataParallel):
            return self.wrapped.no_sync()
        return nullcontext()

    def release(self, outputs: Sequence[Tensor]) -> None:
        """What DDP's own forward does where it is not held back."""
        if isinstance(ddp := self.wrapped, DistributedDataParallel):
            ddp.require_forward_param_sync = True  # the next step begins with rank 0's buffers
            ddp.reducer.prepare_for_backward(list(outputs) if ddp.find_unused_parameters else [])

    def scale(self, loss: Tensor) -> Tensor:
        return self.scaler.scale(loss)

    def clip(self, max_norm: float | None) -> float:
        self.scaler.unscale_(self.optimizer)
        return clip_gradients(self.trained, max_norm)

    def update(self) -> None:
        self.scaler.step(self.optimizer)  # if enabled, leaves the weights alone on an overflow,
        self.scaler.update()  # and lowers its scale
        self.optimizer.zero_grad(set_to_none=True)
        constrain(self.module)

    def skip(self) -> None:
        self.scaler.update()
        super().skip()

    def weights(self) -> dict[str, Tensor]:
        return self.module.state_dict()

    def optimizer_state(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def scaler_state(self) -> dict[str, Any] | None:
        return self.scaler.state_dict() or None

    def load(self, optimizer: State, scaler: State | None, weights: Weights) -> None:
        self.optimizer.load_state_dict(dict(optimizer))
        if scaler is not None:
            self.scaler.load_state_dict(dict(scaler))


@torch.no_grad()
def clip_gradients(parameters: Iterable[Tensor], max_norm: float | None) -> float:
    """Scale the gradients down to a global L2 norm of ``max_norm``; returns the norm before.

    Waits for the device. ``None`` only measures; a norm that is not finite leaves them as they are.
    """
    having = list(parameters)
    norm = float(nn.utils.get_total_norm([p.grad for p in having if p.grad is not None]))
    if max_norm is not None and max_norm < norm < float("inf"):
        nn.utils.clip_grads_with_norm_(having, max_norm, torch.tensor(norm))
    return norm
