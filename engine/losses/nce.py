"""Softmax contrast (CLIP, arXiv 2103.00020) of any batch, with memory O(B·D + one tile).

With S = s·I Tᵀ over the N rows that share negatives, r_i = log Σ_j exp S_ij, c_j = log Σ_i exp S_ij
and targets Y and Y' of the two directions,

    L     = ½/N · [ Σ_i (r_i − Σ_j Y_ij S_ij)  +  Σ_j (c_j − Σ_i Y'_ij S_ij) ]
    dL/dS = ½/N · [ (exp(S − r) − Y)  +  (exp(S − c) − Y') ]  =  ½/N · W
    dL/dI = ½ s/N · W T,    dL/dT = ½ s/N · Wᵀ I,    dL/ds = ⟨I, dL/dI⟩ / s

Forward computes each tile of S once, for r and c; backward once more, for W; and each of the two
products once: 4 in all, the least without S stored. For the traffic between ranks see ``Exchange``.

``MixUpNCE`` is the same loss of features mixed with a partner's: λ·CE(own) + (1 − λ)·CE(partner's),
by targets Y that have both.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from engine.config import schema
from engine.dist import collectives
from engine.errors import UserError
from engine.losses.contrast import Contrast, Exchange, agreement, inner
from engine.losses.tiles import Positive, Tiles, compute_dtype
from engine.types import Features

NAMES = ("NCE", "MixUpNCE", "mixup_nce")


class SoftmaxContrast(torch.autograd.Function):
    """(image_BD, text_BD, scale [ ]) → this rank's L_r (see ``Exchange``).

    Without ``nce.gather_backward`` the gathered side is a constant: the gradient reaches each
    feature through its own direction alone.
    """

    @staticmethod
    def forward(
        ctx: Any,
        image_BD: Tensor,
        text_BD: Tensor,
        scale: Tensor,
        matches: list[Positive],
        exchange: Exchange,
        nce: schema.NceLoss,
        tile_size: int | None,
    ) -> Tensor:
        dtype = compute_dtype(image_BD)
        row_B = image_BD.new_full((len(image_BD),), -torch.inf, dtype=dtype)
        column_G = image_BD.new_full((exchange.num_columns,), -torch.inf, dtype=dtype)
        text_sum_D = image_BD.new_zeros(image_BD.shape[1], dtype=dtype)

        def add_log_sums(block: slice, text_KD: Tensor, _: Tensor | None) -> None:
            tiles = Tiles(image_BD, text_KD, scale, matches=[], rows=tile_size)
            column_K = column_G[block]
            for at in tiles:
                (rows, columns), (row_h, column_w) = at, tiles.log_sums(at)
                row_B[rows] = torch.logaddexp(row_B[rows], row_h)
                column_K[columns] = torch.logaddexp(column_K[columns], column_w)
            if nce.smoothing:
                text_sum_D.add_(text_KD.sum(0, dtype=dtype))

        texts = exchange.collect(text_BD)
        exchange.visit(texts, add_log_sums)
        column_G = _log_sum_over_ranks(column_G, exchange)
        matched = scale * agreement(image_BD, text_BD, matches)
        if nce.smoothing:
            spread = scale / exchange.num_columns * image_BD.sum(0, dtype=dtype).dot(text_sum_D)
            matched = (1 - nce.smoothing) * matched + nce.smoothing * spread
        ctx.save_for_backward(image_BD, text_BD, texts, scale, row_B, column_G)
        ctx.rest = matches, exchange, nce, tile_size
        return exchange.weight * ((row_B.sum() + column_G[exchange.own].sum()) / 2 - matched)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        image_BD, text_BD, texts, scale, row_B, column_G = ctx.saved_tensors
        matches, exchange, nce, tile_size = ctx.rest
        keep, uniform = 1 - nce.smoothing, nce.smoothing / max(1, exchange.num_columns)
        matches = [
            Positive(m.text, keep * m.image_to_text, keep * m.text_to_image) for m in matches
        ]
        dimage_BD = torch.zeros_like(image_BD, dtype=row_B.dtype)

        def add_gradients(block: slice, text_KD: Tensor, dtext_KD: Tensor) -> None:
            own = exchange.own.start - block.start
            tiles = Tiles(image_BD, text_KD, scale, matches=matches, own=own, rows=tile_size)
            column_K = column_G[block]
            for at in tiles:
                sums = row_B[at[0]], column_K[at[1]]
                dlogits = tiles.softmax_dlogits(at, *sums, uniform, mutual=nce.gather_backward)
                tiles.add_products(at, dlogits, dimage_BD, dtext_KD)

        with torch.autocast(image_BD.device.type, enabled=False):
            dtext_BD = exchange.visit(texts, add_gradients, row_B.dtype)
            factor = grad * exchange.weight / 2
            along_scale = inner(image_BD, dimage_BD)
            if not nce.gather_backward:
                along_scale += inner(text_BD, dtext_BD)
            dscale = factor * along_scale
            dimage_BD.mul_(factor * scale)
            dtext_BD.mul_(factor * scale)
        gradients = dimage_BD.to(image_BD.dtype), dtext_BD.to(text_BD.dtype), dscale
        return *gradients, None, None, None, None


def _log_sum_over_ranks(part_G: Tensor, exchange: Exchange) -> Tensor:
    """log Σ over ranks of exp(part), by a maximum and a sum of one float a column."""
    if exchange.size == 1:
        return part_G
    peak_G = collectives.all_reduce_(part_G.clone(), "max", exchange.group)
    sum_G = collectives.all_reduce_((part_G - peak_G).exp_(), "sum", exchange.group)
    return sum_G.log_().add_(peak_G)


class NCE(Contrast):
    """The loss of a task: ``loss.nce_loss`` and, by the name MixUpNCE, ``loss.mixup``."""

    def __init__(self, config: schema.Loss) -> None:
        temperature = config.temperature
        if temperature.name == "parameter" and temperature.value < temperature.min:
            raise UserError(
                f"loss.temperature.value {temperature.value} is below loss.temperature.min "
                f"{temperature.min}, where a learned one is held; lower min, or set name: constant",
                key="loss.temperature.value",
            )
        super().__init__(config, log_scale=-math.log(temperature.value))

    def contrast(self, features: Features, scale: Tensor, matches: list[Positive]) -> Tensor:
        image_BD, text_BD = features.per_sample["image_BD"], features.per_sample["text_BD"]
        nce = self.config.nce_loss
        exchange = Exchange(len(image_BD), self.config.gather, nce.group_size)
        return SoftmaxContrast.apply(
            image_BD, text_BD, scale, matches, exchange, nce, self.config.tile_size
        )


build = NCE
