"""How the ranks of a run hold its weights, gradients and optimizer state, whatever the strategy.

A strategy is a file of this folder, chosen by ``dist.name``, or a module from outside. It defines

    SHARDS: bool         ``build`` takes the module on the CPU and moves it, shard by shard
    check(config, device, precision)
                         UserError for whatever cannot work, before any data is read
    device_bytes(config, precision, world, whole)
                         what one device holds of ``whole`` weights, gradients and optimizer bytes
    build(module, optimizer, config, device, precision) -> Parallel
                         what is to stay frozen is so by now; the weights are those to start from

where ``config`` is the whole configuration and ``precision`` the name of a number format.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from engine.dist import collectives
from engine.errors import UserError

Bytes = Mapping[str, int]  # of weights, gradients and optimizer
State = Mapping[str, Any]
Weights = Callable[[], Mapping[str, Tensor]]


class Parallel(nn.Module, ABC):
    """A model and its optimizer as the ranks hold them; called as the model itself.

    All ranks call each method, in the same order. A checkpoint is always given whole tensors by
    parameter, so that it can be read at any number of ranks and by every strategy.
    """

    module: nn.Module  # the model as the task built it
    wrapped: nn.Module  # what runs it: itself, or what a library has put around it
    optimizer: torch.optim.Optimizer  # its groups carry the learning rates
    lockstep = False  # a forward pass waits for the other ranks, so that none may repeat it alone
    scales_loss = False  # fp16: overflows are expected, and lower the scale
    copies = True  # ``weights`` and ``optimizer_state`` share no memory with what trains

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.wrapped(*args, **kwargs)

    def hold(self) -> AbstractContextManager[None]:
        """Within the block gradients add up on each rank.

        They are averaged over all ranks by the backward after ``release``, or at the block's end.
        """
        return nullcontext()

    def release(self, outputs: Sequence[Tensor]) -> None:
        """The next backward, which starts at ``outputs``, is the last one within ``hold``."""

    def scale(self, loss: Tensor) -> Tensor:
        """The loss times the fp16 scale, where this class and not its library applies it."""
        return loss

    def backward(
        self, outputs: Sequence[Tensor], gradients: Sequence[Tensor] | None = None
    ) -> None:
        """As torch.autograd.backward; averages gradients over the ranks unless they are held."""
        torch.autograd.backward(outputs, gradients)

    @abstractmethod
    def clip(self, max_norm: float | None) -> float:
        """The gradients' norm before clipping; they are clipped by the end of ``update``."""

    @abstractmethod
    def update(self) -> None:
        """One optimizer step on the accumulated gradients, which it clears."""

    def skip(self) -> None:
        """Drop the accumulated gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    @abstractmethod
    def weights(self) -> dict[str, Tensor]:
        """Rank 0: the state dict in full precision, whole. May be empty elsewhere."""

    @abstractmethod
    def optimizer_state(self) -> dict[str, Any]:
        """Rank 0: the state dict of the optimizer over whole parameters. May be empty elsewhere."""

    def scaler_state(self) -> dict[str, Any] | None:
        """Of what scales the loss; None where nothing does."""
        return None

    @abstractmethod
    def load(self, optimizer: State, scaler: State | None, weights: Weights) -> None:
        """Continue from a checkpoint, with whose ``weights`` the strategy was built.

        ``weights`` reads them once more, for a strategy that has rounded them.
        """

    def whole(self) -> AbstractContextManager[None]:
        """Within the block the module itself can be run: each rank has all of the weights."""
        return nullcontext()


def constrain(module: nn.Module) -> None:
    """Let a model clamp what it keeps in bounds (a temperature, say) after an update."""
    clamp = getattr(module, "constrain", None)
    if callable(clamp):
        clamp()


class Sharded(Parallel):
    """Whose ranks have shards of the weights, the gradients or the optimizer's state."""

    @abstractmethod
    def gathered(self, tensor: Tensor) -> Tensor:
        """A parameter or buffer, whole and on the CPU, at rank 0; others only help to gather it."""

    def weights(self) -> dict[str, Tensor]:
        """Each tensor is gathered once, however many names it has."""
        named = self.module.state_dict(keep_vars=True)
        known = {id(tensor): tensor for tensor in named.values()}
        whole = {number: self.gathered(tensor) for number, tensor in known.items()}
        if collectives.rank() != 0:
            return {}
        return {name: whole[id(tensor)] for name, tensor in named.items()}


def at_rank_0(tensor: Tensor) -> Tensor:
    """A copy on the CPU at rank 0, nothing elsewhere."""
    copied = collectives.rank() == 0
    return tensor.detach().to("cpu", copy=True) if copied else torch.empty(0)


def refuse_offload(offloads: bool, device: torch.device) -> None:
    """Raises UserError on a CPU."""
    if offloads and device.type == "cpu":
        raise UserError(
            "offload moves memory from GPUs to the host, and this run is on the CPU: leave it out",
            key="dist.param.offload",
        )


def refuse_batch_norm(module: nn.Module, weights: str) -> None:
    """Raises UserError for batch norm with ``weights`` in other than fp32, as its statistics are.

    torch computes it in one format or not at all.
    """
    for name, part in module.named_modules():
        if weights != "fp32" and isinstance(part, _BatchNorm) and part.affine:
            remedy = "leave dist.param.weights out" if weights == "bf16" else "take bf16"
            raise UserError(
                f"{name} is a batch norm, whose statistics are fp32; it cannot have weights in "
                f"{weights}: {remedy}, or take an encoder with layer or group norm (for "
                "timm's ResNets model.image_encoder.param.norm_layer=groupnorm1)",
                key="dist.param.weights" if weights == "bf16" else "dist.precision",
            )
