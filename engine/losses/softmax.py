"""Softmax contrast (CLIP, arXiv 2103.00020) of any batch, with memory O(B·D + one tile).

With S = s·I Tᵀ over the N rows that share negatives, r_i = log Σ_j exp S_ij, c_j = log Σ_i exp S_ij
and targets Y and Y' of the two directions,

    L     = ½/N · [ Σ_i (r_i − Σ_j Y_ij S_ij)  +  Σ_j (c_j − Σ_i Y'_ij S_ij) ]
    dL/dS = ½/N · [ (exp(S − r) − Y)  +  (exp(S − c) − Y') ]  =  ½/N · W
    dL/dI = ½ s/N · W T,    dL/dT = ½ s/N · Wᵀ I,    dL/ds = ⟨I, dL/dI⟩ / s

Forward computes each tile of S once, for r and c; backward once more, for W; and each of the two
products once: 4 in all, the least without S stored. Between ranks see ``exchange``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from engine.config import schema
from engine.dist import collectives
from engine.errors import UserError
from engine.losses.exchange import Exchange
from engine.losses.fused import tiles_for
from engine.losses.mixing import draw
from engine.losses.tiles import Positive, agreement, compute_dtype, inner, positives
from engine.types import Features, Mix


@dataclass(frozen=True, slots=True)
class SoftmaxOptions:
    """``smoothing``: share of the target spread over all columns. ``mutual``: whether the gradient
    reaches each feature through the other direction too; else the gathered side is a constant."""

    smoothing: float = 0.0
    mutual: bool = True
    tile_size: int | None = None


class SoftmaxContrast(torch.autograd.Function):
    """(image_BD, text_BD, scale [ ]) → this rank's L_r (see ``Exchange``)."""

    @staticmethod
    def forward(
        ctx: Any,
        image_BD: Tensor,
        text_BD: Tensor,
        scale: Tensor,
        matches: list[Positive],
        exchange: Exchange,
        options: SoftmaxOptions,
    ) -> Tensor:
        dtype, start = compute_dtype(image_BD), exchange.own.start
        row_B = image_BD.new_full((len(image_BD),), -torch.inf, dtype=dtype)
        column_G = image_BD.new_full((exchange.num_columns,), -torch.inf, dtype=dtype)
        text_sum_D = image_BD.new_zeros(image_BD.shape[1], dtype=dtype)

        def work(block: slice, text_KD: Tensor) -> None:
            tiles = tiles_for(
                image_BD, text_KD, scale, matches=[], own=start, rows=options.tile_size
            )
            column_K = column_G[block]
            for rows, columns in tiles:
                row_h, column_w = tiles.log_sums(rows, columns)
                row_B[rows] = torch.logaddexp(row_B[rows], row_h)
                column_K[columns] = torch.logaddexp(column_K[columns], column_w)
            if options.smoothing:
                text_sum_D.add_(text_KD.sum(0, dtype=dtype))

        texts = exchange.collect(text_BD)
        exchange.visit(texts, work)
        column_G = _log_sum_over_ranks(column_G, exchange)
        matched = scale * agreement(image_BD, text_BD, matches)
        if options.smoothing:
            spread = scale / exchange.num_columns * image_BD.sum(0, dtype=dtype).dot(text_sum_D)
            matched = (1 - options.smoothing) * matched + options.smoothing * spread
        ctx.save_for_backward(image_BD, text_BD, texts, scale, row_B, column_G)
        ctx.matches, ctx.exchange, ctx.options = matches, exchange, options
        return exchange.weight * ((row_B.sum() + column_G[exchange.own].sum()) / 2 - matched)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        image_BD, text_BD, texts, scale, row_B, column_G = ctx.saved_tensors
        exchange, options = ctx.exchange, ctx.options
        keep, uniform = 1 - options.smoothing, options.smoothing / max(1, exchange.num_columns)
        matches = [
            Positive(m.text, keep * m.image_to_text, keep * m.text_to_image) for m in ctx.matches
        ]
        dimage_BD = torch.zeros_like(image_BD, dtype=row_B.dtype)

        def work(block: slice, text_KD: Tensor, dtext_KD: Tensor) -> None:
            own = exchange.own.start - block.start
            tiles = tiles_for(
                image_BD, text_KD, scale, matches=matches, own=own, rows=options.tile_size
            )
            column_K = column_G[block]
            for rows, columns in tiles:
                sums = row_B[rows], column_K[columns]
                if options.mutual:
                    excess = (tiles.softmax_excess_sum(rows, columns, *sums, uniform),) * 2
                else:
                    excess = tiles.softmax_excess(rows, columns, *sums, uniform)
                tiles.add_products(rows, columns, excess, dimage_BD, dtext_KD)

        with torch.autocast(image_BD.device.type, enabled=False):
            dtext_BD = exchange.visit_with_gradient(texts, row_B.dtype, work)
            factor = grad * exchange.weight / 2
            along_scale = inner(image_BD, dimage_BD)
            if not options.mutual:
                along_scale += inner(text_BD, dtext_BD)
            dscale = factor * along_scale
            dimage_BD.mul_(factor * scale)
            dtext_BD.mul_(factor * scale)
        return dimage_BD.to(image_BD.dtype), dtext_BD.to(text_BD.dtype), dscale, None, None, None


def _log_sum_over_ranks(part_G: Tensor, exchange: Exchange) -> Tensor:
    """log Σ over ranks of exp(part), by a maximum and a sum of one float a column."""
    if exchange.size == 1:
        return part_G
    peak_G = collectives.all_reduce_(part_G.clone(), "max", exchange.group)
    sum_G = collectives.all_reduce_((part_G - peak_G).exp_(), "sum", exchange.group)
    return sum_G.log_().add_(peak_G)


class SoftmaxLoss:
    """The loss of a task by ``loss.nce_loss``; with ``mixup``, of mixed features."""

    def __init__(self, config: schema.Loss, mixup: schema.Mixup | None = None) -> None:
        temperature, learned = config.temperature, config.temperature.name == "parameter"
        if learned and temperature.value < temperature.min:
            raise UserError(
                f"loss.temperature.value {temperature.value} is below loss.temperature.min "
                f"{temperature.min}, where a learned one is held; lower min, or set name: constant",
                key="loss.temperature.value",
            )
        self.config, self.mixup = config, mixup
        self.parameters = {"logit_scale": (-math.log(temperature.value), learned)}
        self.bounds = {"logit_scale": (None, -math.log(temperature.min))} if learned else {}

    def mix(self, step: int, seed: int) -> Mix | None:
        """What this step mixes, a pure function of step and seed."""
        return draw(step, seed, self.mixup) if self.mixup else None

    def __call__(self, features: Features) -> dict[str, Tensor]:
        """{"loss": L_r}; the mean of L_r over ranks, and of its gradient, is the global batch's."""
        image_BD, text_BD = features.per_sample["image_BD"], features.per_sample["text_BD"]
        nce = self.config.nce_loss
        options = SoftmaxOptions(nce.smoothing, nce.gather_backward, self.config.tile_size)
        with torch.autocast(image_BD.device.type, enabled=False):
            dtype = compute_dtype(image_BD)
            scale = features.shared["logit_scale"].to(dtype).exp().squeeze()
            partner_B = features.per_sample.get("partner_offset_B")
            lam = features.info.get("lam", 1.0)
            matches = positives(len(image_BD), image_BD.device, partner_B, lam)
            exchange = Exchange(len(image_BD), self.config.gather, nce.group_size)
            loss = SoftmaxContrast.apply(image_BD, text_BD, scale, matches, exchange, options)
        return {"loss": loss}
