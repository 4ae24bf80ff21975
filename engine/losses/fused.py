"""Tiles on a GPU: the same methods as ``Tiles`` by Triton kernels, for bf16 features.

Products run on tensor cores with fp32 sums; the logits never reach memory. Without Triton, on the
CPU, or for other dtypes, ``tiles_for`` gives the eager ``Tiles``, which compute in fp32.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from engine.losses.tiles import Positive, Tiles

_BLOCK = {"HEIGHT": 128, "WIDTH": 128, "STEP": 64}  # of a program


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def tiles_for(image_BD: Tensor, text_KD: Tensor, *args: Any, **options: Any) -> Tiles:
    """The tiles that suit the features' device and dtype; arguments as for ``Tiles``."""
    bf16 = image_BD.dtype == text_KD.dtype == torch.bfloat16
    if bf16 and image_BD.is_cuda and _has_triton() and min(len(image_BD), len(text_KD)):
        return FusedTiles(image_BD, text_KD, *args, **options)
    if image_BD.is_cuda:  # larger tiles: there is no cache to stay in, but launches cost
        options |= {"rows": options.get("rows") or 4096, "columns": 8192}
    return Tiles(image_BD, text_KD, *args, **options)


class FusedTiles(Tiles):
    """``Tiles`` whose products and elementwise work are one kernel each."""

    def __init__(
        self,
        image_BD: Tensor,
        text_KD: Tensor,
        scale: Tensor,
        bias: Tensor | None = None,
        *,
        matches: list[Positive],
        own: int = 0,
        rows: int | None = None,
        columns: int = 8192,
    ) -> None:
        self.image_BD, self.text_KD = image_BD.contiguous(), text_KD.contiguous()
        self.scale = scale.float()
        self.bias = torch.zeros_like(self.scale) if bias is None else bias.float()
        self.shape = min(rows or 8192, len(image_BD)), min(columns, len(text_KD))
        self._buffers: dict[int, Tensor] = {}
        self.matches, self._own = matches, own
        self._match_MB = torch.stack([own + m.text for m in matches]) if matches else None

    def _launch(self, kernel: Any, rows: slice, columns: slice, *args: Any, **sizes: int) -> None:
        image_hD, text_wD = self.image_BD[rows], self.text_KD[columns]
        heights, widths = self._blocks(rows, columns)
        kernel[(heights * widths,)](
            image_hD, text_wD, self.scale, self.bias, *args,
            len(image_hD), len(text_wD), image_hD.shape[1], heights,
            **sizes, **_BLOCK, num_warps=8, num_stages=3,
        )  # fmt: skip

    def _blocks(self, rows: slice, columns: slice) -> tuple[int, int]:
        height, width = rows.stop - rows.start, columns.stop - columns.start
        return -(-height // _BLOCK["HEIGHT"]), -(-width // _BLOCK["WIDTH"])

    def _targets(self, rows: slice, columns: slice, weights: Sequence[float]) -> tuple:
        """The kernels' match, weights and number of matches."""
        assert self._match_MB is not None
        weight_M = torch.empty(len(weights), device=self.scale.device)
        for number, weight in enumerate(weights):  # a fill does not make the host wait; a copy may
            weight_M[number].fill_(weight)
        return (self._match_MB[:, rows] - columns.start).contiguous(), weight_M

    def log_sums(self, rows: slice, columns: slice) -> tuple[Tensor, Tensor]:
        from engine.losses import kernels

        heights, widths = self._blocks(rows, columns)
        row_parts = self.scale.new_empty(widths, rows.stop - rows.start)
        column_parts = self.scale.new_empty(heights, columns.stop - columns.start)
        self._launch(kernels.log_sums, rows, columns, row_parts, column_parts)
        return row_parts.logsumexp(0), column_parts.logsumexp(0)

    def _softmax(
        self,
        rows: slice,
        columns: slice,
        sums: tuple[Tensor, Tensor],
        uniform: float,
        to_text: float,
        to_image: float,
    ) -> Tensor:
        from engine.losses import kernels

        weights = [to_text * m.image_to_text + to_image * m.text_to_image for m in self.matches]
        match, weight = self._targets(rows, columns, weights)
        out = self._buffer(0 if to_text else 1, rows, columns)
        self._launch(
            kernels.softmax_excess, rows, columns, *sums, match, weight, out,
            to_text, to_image, uniform * (to_text + to_image), MATCHES=len(weights),
        )  # fmt: skip
        return out

    def softmax_excess(
        self, rows: slice, columns: slice, row_h: Tensor, column_w: Tensor, uniform: float
    ) -> tuple[Tensor, Tensor]:
        sums = row_h.contiguous(), column_w.contiguous()
        to_text = self._softmax(rows, columns, sums, uniform, 1.0, 0.0)
        return to_text, self._softmax(rows, columns, sums, uniform, 0.0, 1.0)

    def softmax_excess_sum(
        self, rows: slice, columns: slice, row_h: Tensor, column_w: Tensor, uniform: float
    ) -> Tensor:
        sums = row_h.contiguous(), column_w.contiguous()
        return self._softmax(rows, columns, sums, uniform, 1.0, 1.0)

    def sigmoid_excess(self, rows: slice, columns: slice) -> tuple[Tensor, Tensor, Tensor]:
        from engine.losses import kernels

        weights = [(m.image_to_text + m.text_to_image) / 2 for m in self.matches]
        match, weight = self._targets(rows, columns, weights)
        heights, widths = self._blocks(rows, columns)
        losses, sums = self.scale.new_empty(2, heights * widths)
        out = self._buffer(0, rows, columns)
        self._launch(
            kernels.sigmoid_excess, rows, columns, match, weight, losses, sums, out,
            MATCHES=len(weights),
        )  # fmt: skip
        return losses.sum(dtype=torch.float64), sums.sum(dtype=torch.float64), out

    def add_products(
        self,
        rows: slice,
        columns: slice,
        excess: tuple[Tensor, Tensor],
        dimage_BD: Tensor,
        dtext_KD: Tensor,
    ) -> None:
        dimage_BD[rows] += _product(excess[0], self.text_KD[columns])
        dtext_KD[columns] += _product(excess[1].t(), self.image_BD[rows])


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a·b with fp32 sums and result. The interpreter that tests kernels has no such product."""
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()
