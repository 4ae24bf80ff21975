"""Weights, gradients and optimizer state in shares by torch's own ``fully_shard`` (FSDP2).

Zhao et al. 2023, arXiv:2304.11277. Each block of a stack of alike ones is gathered right before it
is run and given back afterwards; what lies outside of stacks stays for the whole pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from engine.config.schema import Config, Dist
from engine.dist import collectives
from engine.dist.launch import join_alone
from engine.dist.sharded import Sharded
from engine.errors import UserError
from engine.registry import nearest

_CHOICES = {  # of dist.param, its default first
    "reshard_after_forward": (True, False),  # False: gathered once a step, as ZeRO-2 would be
    "weights": ("fp32", "bf16"),  # in the passes; what is kept and averaged is fp32
    "offload": (None, "cpu"),
}


def check(config: Config, device: torch.device, precision: str) -> None:
    """Raises UserError for whatever cannot work, before any data is read."""
    for name, value in config.dist.param.items():
        if name not in _CHOICES:
            raise UserError(
                f"dist.name fsdp2 has no param {name!r}; {nearest(name, list(_CHOICES))}",
                key=f"dist.param.{name}",
            )
        if value not in _CHOICES[name]:
            known = " or ".join("null" if v is None else str(v) for v in _CHOICES[name])
            raise UserError(f"{name} is {known}, not {value!r}", key=f"dist.param.{name}")
    if precision == "fp16":
        raise UserError("fsdp2 does not scale the loss; take bf16 or fp32, or deepspeed",
                        key="dist.precision")  # fmt: skip
    if config.dist.param.get("weights", "fp32") not in ("fp32", precision):
        raise UserError(f"weights in bf16 go with dist.precision: bf16, which is {precision}",
                        key="dist.param.weights")  # fmt: skip
    if config.dist.param.get("offload") and device.type == "cpu":
        raise UserError(
            "offload moves memory from GPUs to the host, and this run is on the CPU: leave it out",
            key="dist.param.offload",
        )
    if config.optim.name.rpartition(".")[2] in ("LARS", "Adafactor", "Muon"):
        raise UserError(
            f"{config.optim.name} looks at whole parameters, of which each rank has a share; "
            "take torch.optim.AdamW, or dist.name: torch",
            key="optim.name",
        )


def shares(config: Config, precision: str) -> tuple[str, ...]:
    """Of a step's memory (``engine.models.memory``), what is divided by the number of ranks."""
    return ("optimizer", "gradients", "weights")


def build(
    model: nn.Module,
    config: Dist,
    device: torch.device,
    *,
    optimizer: torch.optim.Optimizer,
    run: Config,
    precision: str,
) -> nn.Module:
    """``model`` and its ``optimizer``, shared out; ``dist.param`` is described by ``_CHOICES``.

    ``model`` may lie on the CPU: it reaches the device share by share.
    """
    check(run, device, precision)
    return FullyShared(model, optimizer, config.param, device)


class FullyShared(Sharded):
    """A model whose parameters are DTensors, cut along their first dimension."""

    lockstep = True
    scales_loss = False

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        param: Mapping[str, Any],
        device: torch.device,
    ) -> None:
        super().__init__()
        join_alone(device)
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        low = torch.bfloat16 if param.get("weights") == "bf16" else None
        settings: dict[str, Any] = {
            "mesh": init_device_mesh(device.type, (collectives.world(),)),
            "mp_policy": MixedPrecisionPolicy(
                low, torch.float32 if low else None, cast_forward_inputs=False
            ),
            "offload_policy": CPUOffloadPolicy() if param.get("offload") else OffloadPolicy(),
        }
        self.reshard = bool(param.get("reshard_after_forward", True))
        for block in blocks(module):
            fully_shard(block, reshard_after_forward=self.reshard, **settings)
        fully_shard(module, reshard_after_forward=False, **settings)
        if not param.get("offload"):
            module.to(device)  # buffers
        self.module, self.optimizer = module, optimizer
        self.parts = [part for part in module.modules() if isinstance(part, FSDPModule)]
        shared = dict(module.named_parameters())
        for group in optimizer.param_groups:
            group["params"] = [shared[names[id(whole)]] for whole in group["params"]]
        self.trained = [parameter for parameter in shared.values() if parameter.requires_grad]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Gradients are whole on every rank meanwhile."""
        self._sync(False)
        try:
            yield
        finally:
            self._sync(True)

    def release(self) -> None:
        self._sync(True)

    def _sync(self, wanted: bool) -> None:
        for part in self.parts:
            part.set_requires_gradient_sync(wanted, recurse=False)

    def backward(self, outputs: Sequence[Tensor], gradients: Sequence[Tensor] | None) -> None:
        torch.autograd.backward(outputs, gradients)

    def clip(self, max_norm: float | None) -> float:
        having = [parameter for parameter in self.trained if parameter.grad is not None]
        if not having:
            return 0.0
        norm = nn.utils.get_total_norm([p.grad for p in having if p.grad is not None])
        whole = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        if max_norm is not None and max_norm < whole < float("inf"):
            nn.utils.clip_grads_with_norm_(having, max_norm, torch.tensor(whole))
        return whole

    def update(self) -> None:
        self.optimizer.step()
        self.skip()
        clamp = getattr(self.module, "constrain", None)
        if callable(clamp):
            clamp()

    def skip(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def weights(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        known: dict[int, Tensor] = {}  # a tied tensor is one
        for name, tensor in self.module.state_dict(keep_vars=True).items():
            if id(tensor) not in known:
                known[id(tensor)] = _whole(tensor)
            found[name] = known[id(tensor)]
        return found if collectives.rank() == 0 else {}

    def optimizer_state(self) -> dict[str, Any]:
        saved = self.optimizer.state_dict()
        state = {
            number: {k: _whole(v) if isinstance(v, Tensor) else v for k, v in values.items()}
            for number, values in saved["state"].items()
        }
        return {**saved, "state": state} if collectives.rank() == 0 else {}

    def scaler_state(self) -> dict[str, Any] | None:
        return None

    def load(
        self,
        weights: Mapping[str, Tensor],
        optimizer: Mapping[str, Any],
        scaler: Mapping[str, Any] | None,
    ) -> None:
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        state = {
            number: {key: _share(value, parameters[number]) for key, value in values.items()}
            for number, values in optimizer["state"].items()
        }
        self.optimizer.load_state_dict({**optimizer, "state": state})

    @contextmanager
    def whole(self) -> Iterator[None]:
        for buffer in self.module.buffers():
            dist.broadcast(buffer, 0)  # running statistics are each rank's own
        for part in self.parts:
            part.set_reshard_after_forward(False, recurse=False)
            part.unshard()
        yield
        for part in self.parts:
            again = self.reshard and part is not self.module
            part.set_reshard_after_forward(again, recurse=False)
            part.reshard()


def blocks(module: nn.Module) -> list[nn.Module]:
    """The members of the model's stacks: lists of two or more modules of one class, outermost."""
    found: list[nn.Module] = []
    for child in module.children():
        members = list(child) if isinstance(child, nn.ModuleList | nn.Sequential) else []
        alike = len(members) > 1 and len({type(member) for member in members}) == 1
        if alike and all(any(True for _ in member.parameters()) for member in members):
            found += members
        else:
            found += blocks(child)
    return found


def _whole(tensor: Tensor) -> Tensor:
    """On the CPU, at rank 0; the others only help to gather it."""
    tensor = tensor.detach()
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()
    return tensor.cpu().clone() if collectives.rank() == 0 else torch.empty(0)


def _share(value: Any, parameter: Tensor) -> Any:
    """This rank's share of what belongs to a parameter; what is no tensor of its shape as it is."""
    if not isinstance(value, Tensor) or value.shape != parameter.shape or value.ndim == 0:
        return value
    assert isinstance(parameter, DTensor)
    value = value.to(parameter.device)
    return distribute_tensor(
        value, parameter.device_mesh, parameter.placements, src_data_rank=None
    )  # fmt: skip
