"""Tiles on a GPU: the same methods as ``Tiles`` by Triton kernels, for bf16 features.

Products run on tensor cores with fp32 sums. Each program of a kernel computes one block of
z = scale · I Tᵀ + bias in fp32 registers, and only what is needed of it goes to memory: sums by row
and column, or P − Y rounded to bf16 after the subtraction. Imported only where Triton is installed
and a GPU is used (see ``contrast.tiles_for``).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.losses.tiles import Tile, Tiles

_BLOCK = {"HEIGHT": 128, "WIDTH": 128, "STEP": 64}  # of a program


@triton.jit
def _logits(
    image, text, scale, bias, rows, columns, num_rows, num_columns, width, STEP: tl.constexpr
):
    """One block of z; rows and columns beyond the ends hold anything."""
    within = tl.arange(0, STEP)
    image_rows = image + rows.to(tl.int64)[:, None] * width
    text_rows = text + columns.to(tl.int64)[None, :] * width
    z = tl.zeros((rows.shape[0], columns.shape[0]), tl.float32)
    for start in range(0, width, STEP):
        d = start + within
        image_part = tl.load(
            image_rows + d[None, :],
            mask=(rows < num_rows)[:, None] & (d < width)[None, :],
            other=0.0,
        )
        text_part = tl.load(
            text_rows + d[:, None],
            mask=(columns < num_columns)[None, :] & (d < width)[:, None],
            other=0.0,
        )
        z = tl.dot(image_part, text_part, z)
    return z * tl.load(scale) + tl.load(bias)


@triton.jit
def _positions(row_blocks, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """This program's rows and columns: neighbours in launch order share columns."""
    row_block = tl.program_id(0) % row_blocks
    column_block = tl.program_id(0) // row_blocks
    rows = row_block * HEIGHT + tl.arange(0, HEIGHT)
    columns = column_block * WIDTH + tl.arange(0, WIDTH)
    return row_block, column_block, rows, columns


@triton.jit
def _targets(
    match, weights, rows, columns, num_rows, MATCHES: tl.constexpr, HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Y of the block: ``match`` [MATCHES, rows] holds columns, ``weights`` [MATCHES]."""
    y = tl.zeros((HEIGHT, WIDTH), tl.float32)
    for number in tl.static_range(MATCHES):
        column = tl.load(match + number * num_rows + rows, mask=rows < num_rows, other=-1)
        y += tl.where(column[:, None] == columns[None, :], tl.load(weights + number), 0.0)
    return y


@triton.jit
def log_sums_kernel(
    image, text, scale, bias, row_parts, column_parts, num_rows, num_columns, width, row_blocks,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Each block's log Σ exp by row → row_parts [column blocks, rows], and by column likewise."""
    row_block, column_block, rows, columns = _positions(row_blocks, HEIGHT, WIDTH)
    z = _logits(image, text, scale, bias, rows, columns, num_rows, num_columns, width, STEP)
    valid = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    z = tl.where(valid, z, -1e30)  # finite, so that a block's edge gives no NaN
    peak = tl.max(z, 1)
    sums = tl.log(tl.sum(tl.exp(z - peak[:, None]), 1)) + peak
    tl.store(row_parts + column_block * num_rows + rows, sums, mask=rows < num_rows)
    peak = tl.max(z, 0)
    sums = tl.log(tl.sum(tl.exp(z - peak[None, :]), 0)) + peak
    tl.store(column_parts + row_block * num_columns + columns, sums, mask=columns < num_columns)


@triton.jit
def softmax_dlogits_kernel(
    image, text, scale, bias, row_sums, column_sums, match, weights, out,
    to_text, to_image, uniform, num_rows, num_columns, width, row_blocks,
    MATCHES: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """to_text · exp(z − row sum) + to_image · exp(z − column sum) − Y − uniform, in out's dtype."""
    _row_block, _column_block, rows, columns = _positions(row_blocks, HEIGHT, WIDTH)
    z = _logits(image, text, scale, bias, rows, columns, num_rows, num_columns, width, STEP)
    row_sum = tl.load(row_sums + rows, mask=rows < num_rows, other=0.0)
    column_sum = tl.load(column_sums + columns, mask=columns < num_columns, other=0.0)
    p = to_text * tl.exp(z - row_sum[:, None]) + to_image * tl.exp(z - column_sum[None, :])
    y = _targets(match, weights, rows, columns, num_rows, MATCHES, HEIGHT, WIDTH)
    place = out + rows.to(tl.int64)[:, None] * num_columns + columns[None, :]
    valid = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    tl.store(place, (p - y - uniform).to(out.dtype.element_ty), mask=valid)


@triton.jit
def sigmoid_dlogits_kernel(
    image, text, scale, bias, match, weights, losses, sums, out,
    num_rows, num_columns, width, row_blocks,
    MATCHES: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """σ(z) − Y in out's dtype; each program's Σ softplus(z) and Σ (σ(z) − Y)."""
    _row_block, _column_block, rows, columns = _positions(row_blocks, HEIGHT, WIDTH)
    z = _logits(image, text, scale, bias, rows, columns, num_rows, num_columns, width, STEP)
    valid = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    small = tl.exp(-tl.abs(z))
    # log(1 + e) loses a small e; its series does not
    log1p = tl.where(small < 1e-3, small * (1 - small * (0.5 - small / 3)), tl.log(1 + small))
    softplus = tl.where(valid, tl.maximum(z, 0.0) + log1p, 0.0)
    sigmoid = tl.where(z >= 0, 1.0, small) / (1 + small)
    y = _targets(match, weights, rows, columns, num_rows, MATCHES, HEIGHT, WIDTH)
    dlogits = tl.where(valid, sigmoid - y, 0.0)
    tl.store(losses + tl.program_id(0), tl.sum(tl.sum(softplus, 1), 0))
    tl.store(sums + tl.program_id(0), tl.sum(tl.sum(dlogits, 1), 0))
    place = out + rows.to(tl.int64)[:, None] * num_columns + columns[None, :]
    tl.store(place, dlogits.to(out.dtype.element_ty), mask=valid)


class FusedTiles(Tiles):
    """``Tiles`` whose products and elementwise work are one kernel each."""

    default_shape = 8192, 8192

    def __init__(
        self,
        image_BD: Tensor,
        text_KD: Tensor,
        scale: Tensor,
        bias: Tensor | None = None,
        **options: Any,
    ) -> None:
        scale = scale.float()
        bias = torch.zeros_like(scale) if bias is None else bias.float()
        super().__init__(image_BD, text_KD, scale, bias, **options)
        texts = [self.own + match.text for match in self.matches]
        self._match_MB = torch.stack(texts) if texts else None

    def _operand(self, feature: Tensor) -> Tensor:
        return feature.contiguous()

    def _launch(self, kernel: Any, at: Tile, *args: Any, **sizes: int) -> None:
        image_hD, text_wD = self.image_BD[at[0]], self.text_KD[at[1]]
        heights, widths = _blocks(at)
        kernel[(heights * widths,)](
            image_hD, text_wD, self.scale, self.bias, *args,
            len(image_hD), len(text_wD), image_hD.shape[1], heights,
            **sizes, **_BLOCK, num_warps=8, num_stages=3,
        )  # fmt: skip

    def _matches_of(self, at: Tile, *directions: float) -> tuple[Tensor, Tensor]:
        """The matched columns of the tile [M, h] and their weights [M]."""
        assert self._match_MB is not None
        rows, columns = at
        weight_M = torch.empty(len(self.matches), device=self.scale.device)
        for number, match in enumerate(self.matches):
            # a fill does not make the host wait; a copy may
            weight_M[number].fill_(match.weight(*directions))
        return (self._match_MB[:, rows] - columns.start).contiguous(), weight_M

    def log_sums(self, at: Tile) -> tuple[Tensor, Tensor]:
        heights, widths = _blocks(at)
        row_parts = self.scale.new_empty(widths, at[0].stop - at[0].start)
        column_parts = self.scale.new_empty(heights, at[1].stop - at[1].start)
        self._launch(log_sums_kernel, at, row_parts, column_parts)
        return row_parts.logsumexp(0), column_parts.logsumexp(0)

    def softmax_dlogits(
        self, at: Tile, row_h: Tensor, column_w: Tensor, uniform: float, *, mutual: bool
    ) -> tuple[Tensor, Tensor]:
        sums = row_h.contiguous(), column_w.contiguous()

        def weighted(buffer: int, to_text: float, to_image: float) -> Tensor:
            out = self._buffer(buffer, at)
            self._launch(
                softmax_dlogits_kernel, at, *sums, *self._matches_of(at, to_text, to_image), out,
                to_text, to_image, uniform * (to_text + to_image), MATCHES=len(self.matches),
            )  # fmt: skip
            return out

        if mutual:
            return (weighted(0, 1.0, 1.0),) * 2
        return weighted(0, 1.0, 0.0), weighted(1, 0.0, 1.0)

    def sigmoid_dlogits(self, at: Tile) -> tuple[Tensor, Tensor, Tensor]:
        heights, widths = _blocks(at)
        losses, sums = self.scale.new_empty(2, heights * widths)
        out = self._buffer(0, at)
        self._launch(
            sigmoid_dlogits_kernel, at, *self._matches_of(at), losses, sums, out,
            MATCHES=len(self.matches),
        )  # fmt: skip
        return losses.sum(dtype=torch.float64), sums.sum(dtype=torch.float64), out

    def add_products(
        self, at: Tile, dlogits: tuple[Tensor, Tensor], dimage_BD: Tensor, dtext_KD: Tensor
    ) -> None:
        rows, columns = at
        dimage_BD[rows] += _product(dlogits[0], self.text_KD[columns])
        dtext_KD[columns] += _product(dlogits[1].t(), self.image_BD[rows])


def _blocks(at: Tile) -> tuple[int, int]:
    """How many programs cover a tile's rows, and its columns."""
    height, width = (part.stop - part.start for part in at)
    return -(-height // _BLOCK["HEIGHT"]), -(-width // _BLOCK["WIDTH"])


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a·b with fp32 sums and result. The interpreter that tests kernels has no such product."""
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()
