"""Weights, gradients and optimizer state sharded by torch's own ``fully_shard`` (FSDP2).

Zhao et al. 2023, arXiv:2304.11277. Each block of a stack of alike ones is gathered right before it
is run and released afterwards; what is outside of stacks stays gathered for the whole pass.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

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
from torch.distributed.tensor import DTensor

from engine.config.explain import validated
from engine.config.schema import Config
from engine.config.section import Section
from engine.dist import collectives
from engine.dist.launch import join_alone
from engine.dist.parallel import (
    Bytes,
    Sharded,
    State,
    Weights,
    at_rank_0,
    constrain,
    refuse_batch_norm,
    refuse_offload,
)
from engine.errors import UserError

SHARDS = True
# Optimizers that take norms, factors or means of whole parameters; timm's c… are cautious forms
_WHOLE = re.compile(r"^c|lar[sc]|lamb|adafactor|muon|kron|novograd|adamp|sgdp|adahessian")


class Param(Section):
    """``dist.param`` of ``dist.name: fsdp2``."""

    reshard_after_forward: bool = True  # false: gathered once a step, as with ZeRO-2
    weights: Literal["fp32", "bf16"] = "fp32"  # in the passes; what is kept and averaged is fp32
    offload: Literal["cpu"] | None = None


def _param(config: Config) -> Param:
    return validated(Param, config.dist.param, "dist.param")


def check(config: Config, device: torch.device, precision: str) -> None:
    """Raises UserError for whatever cannot work, before any data is read."""
    param = _param(config)
    if precision == "fp16":
        raise UserError("fsdp2 does not scale the loss; take bf16 or fp32, or deepspeed",
                        key="dist.precision")  # fmt: skip
    if param.weights not in ("fp32", precision):
        raise UserError(f"weights in bf16 go with dist.precision: bf16, which is {precision}",
                        key="dist.param.weights")  # fmt: skip
    refuse_offload(param.offload is not None, device)
    if _WHOLE.search(config.optim.name.rpartition(".")[2].lower()):
        raise UserError(
            f"{config.optim.name} computes with whole parameters, of which each rank has a shard; "
            "take torch.optim.AdamW, or dist.name: torch",
            key="optim.name",
        )


def device_bytes(config: Config, precision: str, world: int, whole: Bytes) -> Bytes:
    """What one device holds of weights, gradients and optimizer; ``whole`` is by DDP in fp32."""
    offloads = _param(config).offload is not None
    return {name: 0 if offloads else size // world for name, size in whole.items()}


class FullySharded(Sharded):
    """A model whose parameters are DTensors, split along their first dimension.

    The ranks communicate on the devices of the mesh, wherever the shards are: a group cannot send
    those that are kept in the host's memory.
    """

    lockstep = True

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: Config,
        device: torch.device,
        precision: str,
    ) -> None:
        super().__init__()
        param = _param(config)
        refuse_batch_norm(module, param.weights)
        join_alone(device)
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        low = param.weights == "bf16"
        formats = torch.bfloat16 if low else None, torch.float32 if low else None
        shard = functools.partial(
            fully_shard,
            mesh=init_device_mesh(device.type, (collectives.world(),)),
            mp_policy=MixedPrecisionPolicy(*formats, cast_forward_inputs=False),
            offload_policy=CPUOffloadPolicy(device.type == "cuda")
            if param.offload
            else OffloadPolicy(),
        )
        self.reshard = param.reshard_after_forward
        for block in blocks(module):
            shard(block, reshard_after_forward=self.reshard)
        shard(module, reshard_after_forward=False)
        self.module = self.wrapped = module
        self.optimizer, self.device = optimizer, device
        self.parts = [part for part in module.modules() if isinstance(part, FSDPModule)]
        sharded = dict(module.named_parameters())
        for group in optimizer.param_groups:
            group["params"] = [sharded[names[id(whole)]] for whole in group["params"]]
        self.trained = [parameter for parameter in sharded.values() if parameter.requires_grad]

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Gradients are whole on every rank in the meantime."""
        self._sync(False)
        try:
            yield
        finally:
            self._sync(True)

    def release(self, outputs: Sequence[Tensor]) -> None:
        self._sync(True)

    def _sync(self, wanted: bool) -> None:
        for part in self.parts:
            part.set_requires_gradient_sync(wanted, recurse=False)

    def clip(self, max_norm: float | None) -> float:
        gradients: list[Any] = [p.grad for p in self.trained if p.grad is not None]
        mine = nn.utils.get_total_norm([gradient.to_local() for gradient in gradients])
        square = mine.to(self.device, torch.float64).square()
        norm = float(collectives.all_reduce_(square).sqrt())
        if max_norm is not None and max_norm < norm < float("inf"):
            for gradient in gradients:  # as torch's own clipping does
                gradient.to_local().mul_(max_norm / (norm + 1e-6))
        return norm

    def update(self) -> None:
        self.optimizer.step()
        self.skip()
        constrain(self.module)

    def optimizer_state(self) -> dict[str, Any]:
        saved = self.optimizer.state_dict()
        state = {
            number: {
                key: self.gathered(value) if isinstance(value, Tensor) else value
                for key, value in values.items()
            }
            for number, values in saved["state"].items()
        }
        return {**saved, "state": state} if collectives.rank() == 0 else {}

    def gathered(self, tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        if isinstance(tensor, DTensor):
            tensor = _like(tensor, tensor.to_local().to(self.device)).full_tensor()
        return at_rank_0(tensor)

    def load(self, optimizer: State, scaler: State | None, weights: Weights) -> None:
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        state = {
            number: {key: _shard(value, parameters[number]) for key, value in values.items()}
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


build = FullySharded


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


def _shard(value: Any, parameter: DTensor) -> Any:
    """This rank's shard of whatever has a parameter's shape; anything else as it is.

    Rows as torch.chunk deals them: equally many, the last ranks fewer or none.
    """
    if not isinstance(value, Tensor) or value.ndim == 0 or value.shape != parameter.shape:
        return value
    local = parameter.to_local()
    rows = -(-parameter.shape[0] // collectives.world())
    start = min(collectives.rank() * rows, parameter.shape[0])
    return _like(parameter, value[start : start + len(local)].to(local.device, copy=True))


def _like(other: DTensor, local: Tensor) -> DTensor:
    mesh, shape, stride = other.device_mesh, other.shape, other.stride()
    return DTensor.from_local(
        local, mesh, other.placements, run_check=False, shape=shape, stride=stride
    )
