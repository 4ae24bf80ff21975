"""What a run asks of a model that lies in shares on its ranks, whichever library shares it out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from engine.errors import UserError


class Sharded(nn.Module, ABC):
    """Weights, gradients or optimizer state in shares, one a rank; called as the model itself.

    Each method is everyone's: all ranks call it, in the same order. Whatever a checkpoint is given
    is whole and by parameter, as of a model that was never shared out, so that it can be read at
    any number of ranks and by every strategy.
    """

    lockstep: bool  # a forward pass waits for the other ranks
    scales_loss: bool  # by itself, so that an overflow is its daily work (fp16)
    optimizer: torch.optim.Optimizer  # its groups carry the learning rates

    @abstractmethod
    def hold(self) -> AbstractContextManager[None]:
        """Within the block gradients add up on each rank.

        They are averaged over all by the backward after ``release``, or by the end of the block.
        """

    def release(self) -> None:
        """The next backward is the last one within ``hold``."""

    @abstractmethod
    def backward(self, outputs: Sequence[Tensor], gradients: Sequence[Tensor] | None) -> None:
        """As torch.autograd.backward; averages gradients over the ranks unless they are held."""

    @abstractmethod
    def clip(self, max_norm: float | None) -> float:
        """The gradients' norm before clipping; clipped they are at the latest by ``update``."""

    @abstractmethod
    def update(self) -> None:
        """One optimizer step on the gradients that are there, which it clears."""

    @abstractmethod
    def skip(self) -> None:
        """Leave the gradients that are there unused."""

    @abstractmethod
    def weights(self) -> dict[str, Tensor]:
        """Rank 0: the state dict in full precision, whole, on the CPU. Elsewhere empty."""

    @abstractmethod
    def optimizer_state(self) -> dict[str, Any]:
        """Rank 0: the optimizer's state dict before the model was shared out, on the CPU."""

    @abstractmethod
    def scaler_state(self) -> dict[str, Any] | None:
        """Of what scales the loss; None where nothing does."""

    @abstractmethod
    def load(
        self,
        weights: Mapping[str, Tensor],
        optimizer: Mapping[str, Any],
        scaler: Mapping[str, Any] | None,
    ) -> None:
        """Go on from what the three above gave; the module holds ``weights`` since it was built."""

    @abstractmethod
    def whole(self) -> AbstractContextManager[None]:
        """Within the block the module itself can be run: each rank has all of the weights."""


def refuse_batch_norm(module: nn.Module, weights: str) -> None:
    """Raises UserError for batch norm with ``weights`` in other than fp32, as its statistics are.

    torch computes it in one format or not at all.
    """
    for name, part in module.named_modules():
        if weights != "fp32" and isinstance(part, _BatchNorm) and part.affine:
            remedy = "leave dist.param.weights out" if weights == "bf16" else "take bf16"
            raise UserError(
                f"{name} is a batch norm, whose statistics are fp32, and weights in {weights} do "
                f"not go with it: {remedy}, or take an encoder with layer or group norm (for "
                "timm's ResNets model.image_encoder.param.norm_layer=groupnorm1)",
                key="dist.param.weights" if weights == "bf16" else "dist.precision",
            )
