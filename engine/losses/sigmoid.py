"""Sigmoid contrast (SigLIP, arXiv 2303.15343): every pair is its own yes-or-no question.

With z = s·I Tᵀ + b over the N rows of all ranks, and Y_ij = 1 for a pair, else 0,

    L     = 1/N · Σ_ij [ softplus(z_ij) − Y_ij z_ij ]        (= −log σ(±z_ij))
    dL/dz = 1/N · (σ(z) − Y)  =  1/N · W
    dL/dI = s/N · W T,   dL/dT = s/N · Wᵀ I,   dL/ds = ⟨I, dL/dI⟩ / s,   dL/db = ΣW / N

No element needs another's, so one pass over the tiles gives loss and gradients together: 3 matrix
products, nothing kept but the gradients. Under mixup (``MixUpSigmoid``) Y_ii = λ and
Y_i,partner(i) = 1 − λ: the same formula is then λ times the loss with the pair called a match plus
1 − λ times that with the pair called none, and the other way round for the partner. With a
``group_size`` the sum goes over the pairs within each group of ranks, N still counts all rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from engine.config import schema
from engine.losses.contrast import Contrast, Exchange, agreement, inner
from engine.losses.tiles import Positive, Tiles, compute_dtype
from engine.types import Features

NAMES = ("Sigmoid", "SigLIP", "MixUpSigmoid")


class SigmoidContrast(torch.autograd.Function):
    """(image_BD, text_BD, scale [ ], bias [ ]) → this rank's L_r (see ``Exchange``)."""

    @staticmethod
    def forward(
        ctx: Any,
        image_BD: Tensor,
        text_BD: Tensor,
        scale: Tensor,
        bias: Tensor,
        matches: list[Positive],
        exchange: Exchange,
        tile_size: int | None,
    ) -> Tensor:
        inputs = image_BD, text_BD, scale, bias
        ctx.save_for_backward(*inputs)
        ctx.rest = matches, exchange, tile_size
        needed = any(ctx.needs_input_grad)
        loss, ctx.gradients = _one_pass(inputs, matches, exchange, tile_size, needed)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # Handed out and scaled in place, not copied; a second backward through a retained graph
        # computes them again.
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            matches, exchange, tile_size = ctx.rest
            with torch.autocast(grad.device.type, enabled=False):
                _, gradients = _one_pass(ctx.saved_tensors, matches, exchange, tile_size, True)
        return *(gradient.mul_(grad) for gradient in gradients), None, None, None


def _one_pass(
    inputs: Sequence[Tensor],
    matches: list[Positive],
    exchange: Exchange,
    tile_size: int | None,
    with_gradient: bool,
) -> tuple[Tensor, tuple[Tensor, ...] | None]:
    """The loss, and its gradients for the four inputs."""
    image_BD, text_BD, scale, bias = inputs
    dtype = compute_dtype(image_BD)
    dimage_BD = torch.zeros_like(image_BD, dtype=dtype) if with_gradient else image_BD.new_empty(0)
    loss, dbias = torch.zeros(2, dtype=torch.float64, device=image_BD.device)

    def add_tiles(block: slice, text_KD: Tensor, dtext_KD: Tensor | None) -> None:
        own = exchange.own.start - block.start
        tiles = Tiles(image_BD, text_KD, scale, bias, matches=matches, own=own, rows=tile_size)
        for at in tiles:
            tile_loss, tile_dbias, dlogits = tiles.sigmoid_dlogits(at)
            loss.add_(tile_loss)
            dbias.add_(tile_dbias)
            if dtext_KD is not None:
                tiles.add_products(at, (dlogits, dlogits), dimage_BD, dtext_KD)

    texts = exchange.collect(text_BD)
    dtext_BD = exchange.visit(texts, add_tiles, dtype if with_gradient else None)
    total = loss - scale * agreement(image_BD, text_BD, matches) - bias * len(image_BD)
    total = (exchange.weight * total).to(dtype)
    if not with_gradient:
        return total, None
    dscale = exchange.weight * inner(image_BD, dimage_BD)
    for gradient in (dimage_BD, dtext_BD):
        gradient.mul_(exchange.weight * scale)
    return total, (
        dimage_BD.to(image_BD.dtype),
        dtext_BD.to(text_BD.dtype),
        dscale.to(scale.dtype),
        (exchange.weight * dbias).to(bias.dtype),
    )


class Sigmoid(Contrast):
    """The loss of a task: ``loss.sigmoid_loss`` and, by the name MixUpSigmoid, ``loss.mixup``."""

    def __init__(self, config: schema.Loss) -> None:
        super().__init__(config, log_scale=math.log(config.sigmoid_loss.scale))
        self.parameters["logit_bias"] = (config.sigmoid_loss.bias, True)

    def contrast(self, features: Features, scale: Tensor, matches: list[Positive]) -> Tensor:
        image_BD, text_BD = features.per_sample["image_BD"], features.per_sample["text_BD"]
        bias = features.shared["logit_bias"].to(scale.dtype).squeeze()
        group_size = self.config.sigmoid_loss.group_size
        exchange = Exchange(len(image_BD), self.config.gather, group_size, "sigmoid_loss")
        return SigmoidContrast.apply(
            image_BD, text_BD, scale, bias, matches, exchange, self.config.tile_size
        )


build = Sigmoid
