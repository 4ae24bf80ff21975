"""The arithmetic of one tile of similarities, so that no loss ever holds the whole matrix.

A tile is z_hw = scale · I_h·T_wᵀ (+ bias) for some rows (images) and columns (texts), in fp32, or
fp64 where the features are. ``Tiles`` works in place in one buffer, with as few passes over it as
can be; ``engine.losses.fused`` offers the same methods with fused kernels for CUDA.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_LOG2_E = math.log2(math.e)


@dataclass(frozen=True, slots=True)
class Positive:
    """For each row one column that matches it, with a weight in either direction."""

    text: Tensor  # [B] int64: which of this rank's texts
    image_to_text: float
    text_to_image: float


def positives(
    num_rows: int, device: torch.device, partner_offset_B: Tensor | None, lam: float
) -> list[Positive]:
    """Row i matches text i, and under mixup (weight 1 − λ) also its partner p(i), of this rank too.

    Image to text, row i's partner is column p(i); text to image, column j's partner is row p(j),
    which makes it row i's column p⁻¹(i). They differ only where p is not its own inverse.
    """
    own_B = torch.arange(num_rows, device=device)
    if partner_offset_B is None:
        return [Positive(own_B, 1.0, 1.0)]
    partner_B = own_B + partner_offset_B
    inverse_B = torch.empty_like(own_B).scatter_(0, partner_B, own_B)
    return [
        Positive(own_B, lam, lam),
        Positive(partner_B, 1 - lam, 0.0),
        Positive(inverse_B, 0.0, 1 - lam),
    ]


def agreement(image_BD: Tensor, text_BD: Tensor, matches: list[Positive]) -> Tensor:
    """Σ over rows and matches of the directions' mean weight · I_i·T_match, as a scalar."""
    total = image_BD.new_zeros((), dtype=compute_dtype(image_BD))
    for match in matches:
        weight = (match.image_to_text + match.text_to_image) / 2
        total += weight * inner(image_BD, text_BD, match.text)
    return total


def inner(a_BD: Tensor, b_BD: Tensor, row_B: Tensor | None = None) -> Tensor:
    """Σ_i a_i·b_i, or Σ_i a_i·b_row(i), as a scalar, without a third tensor of their size."""
    total = a_BD.new_zeros((), dtype=compute_dtype(a_BD))
    for part in slices(len(a_BD), 1024):
        b_hD = b_BD[part] if row_B is None else b_BD[row_B[part]]
        total += torch.linalg.vecdot(a_BD[part].to(total.dtype), b_hD.to(total.dtype)).sum()
    return total


def compute_dtype(feature: Tensor) -> torch.dtype:
    """fp64 for fp64 features, else fp32."""
    return torch.float64 if feature.dtype == torch.float64 else torch.float32


def slices(length: int, size: int) -> Iterator[slice]:
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


class Tiles:
    """This rank's rows against a block of columns, tile after tile, with eager operations.

    ``matches`` are columns of the block from ``own`` on (they may lie outside of it); ``rows``
    bounds the rows of a tile.
    """

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
        columns: int = 2048,
    ) -> None:
        self.dtype = compute_dtype(image_BD)
        self.image_BD, self.text_KD = image_BD.to(self.dtype), text_KD.to(self.dtype)
        self.scale, self.bias, self.matches, self.own = scale, bias, matches, own
        self.shape = min(rows or 1024, len(image_BD)), min(columns, len(text_KD))
        self._buffers: dict[int, Tensor] = {}
        self._bounded = self._exp_is_bounded()

    def _exp_is_bounded(self) -> bool:
        """Whether exp(z) and its sums neither overflow nor underflow, as |z| ≤ scale·‖I‖·‖T‖."""
        if self.image_BD.is_cuda or not min(self.shape):
            return False  # on a GPU a look at the norms would make the host wait
        longest_I, longest_T = (x.norm(dim=1).max() for x in (self.image_BD, self.text_KD))
        largest = float(self.scale * longest_I * longest_T)
        limits = torch.finfo(self.dtype)
        most_terms = max(len(self.image_BD), len(self.text_KD))
        return largest < min(-math.log(limits.tiny), math.log(limits.max / most_terms))

    def __iter__(self) -> Iterator[tuple[slice, slice]]:
        for rows in slices(len(self.image_BD), self.shape[0] or 1):
            for columns in slices(len(self.text_KD), self.shape[1] or 1):
                yield rows, columns

    def _buffer(self, number: int, rows: slice, columns: slice) -> Tensor:
        """A tile's memory, made when first used; smaller tiles at the edges take its front."""
        if number not in self._buffers:
            self._buffers[number] = self.image_BD.new_empty(self.shape[0] * self.shape[1])
        height, width = rows.stop - rows.start, columns.stop - columns.start
        return self._buffers[number][: height * width].view(height, width)

    def _logits(self, rows: slice, columns: slice, unit: float = 1.0) -> Tensor:
        tile = self._buffer(0, rows, columns)
        torch.mm(self.image_BD[rows] * (self.scale * unit), self.text_KD[columns].t(), out=tile)
        return tile if self.bias is None else tile.add_(self.bias, alpha=unit)

    def _exponentials(self, rows: slice, columns: slice) -> Tensor:
        """exp(z) where that is bounded; a power of two costs a CPU a third of exp's time."""
        return self._logits(rows, columns, unit=_LOG2_E).exp2_()

    def log_sums(self, rows: slice, columns: slice) -> tuple[Tensor, Tensor]:
        """log Σ exp(z) of the tile's rows [h] and of its columns [w], from one product.

        Where exp(z) is bounded, one exponential serves both. Else rows and columns each have their
        own maxima subtracted: a column far below its rows' maxima would vanish in their scale.
        """
        if self._bounded:
            tile = self._exponentials(rows, columns)
            return tile.sum(1).log_(), tile.sum(0).log_()
        tile = self._logits(rows, columns)
        shifted, sums = self._buffer(1, rows, columns), []
        for dim in (1, 0):
            peak = tile.amax(dim, keepdim=True)
            _exp_(torch.sub(tile, peak, out=shifted))
            sums.append(shifted.sum(dim).log_().add_(peak.squeeze(dim)))
        return sums[0], sums[1]

    def softmax_excess(
        self, rows: slice, columns: slice, row_h: Tensor, column_w: Tensor, uniform: float
    ) -> tuple[Tensor, Tensor]:
        """P − Y of the tile in each direction (image to text, text to image).

        P are softmaxes by the log-sums of whole rows and columns; Y has the matches, and
        ``uniform`` everywhere. Y is subtracted in full precision: near convergence P ≈ Y.
        """
        other = self._buffer(1, rows, columns)
        if self._bounded:
            tile = self._exponentials(rows, columns)
            torch.mul(tile, (-column_w).exp(), out=other)
            tile.mul_((-row_h).exp()[:, None])
        else:
            tile = self._logits(rows, columns)
            _exp_(torch.sub(tile, column_w, out=other))
            _exp_(tile.sub_(row_h[:, None]))
        for match in self.matches:
            self._subtract(tile, rows, columns, match.text, match.image_to_text)
            self._subtract(other, rows, columns, match.text, match.text_to_image)
        return (tile.sub_(uniform), other.sub_(uniform)) if uniform else (tile, other)

    def softmax_excess_sum(
        self, rows: slice, columns: slice, row_h: Tensor, column_w: Tensor, uniform: float
    ) -> Tensor:
        """The sum of ``softmax_excess`` over both directions; one exponential where bounded."""
        if not self._bounded:
            tile, other = self.softmax_excess(rows, columns, row_h, column_w, uniform)
            return tile.add_(other)
        tile, other = self._exponentials(rows, columns), self._buffer(1, rows, columns)
        torch.add((-row_h).exp()[:, None], (-column_w).exp(), out=other)
        tile.mul_(other)
        for match in self.matches:
            weight = match.image_to_text + match.text_to_image
            self._subtract(tile, rows, columns, match.text, weight)
        return tile.sub_(2 * uniform) if uniform else tile

    def sigmoid_excess(self, rows: slice, columns: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Σ softplus(z), Σ (σ(z) − Y), and σ(z) − Y of the tile; Y as the directions' mean."""
        tile = self._logits(rows, columns)
        if tile.is_cuda or float(highest := tile.max()) > 40:
            loss = F.softplus(tile, threshold=50.0).sum()
            tile.sigmoid_()
        else:
            _exp_(tile)
            other = self._buffer(1, rows, columns)
            loss = _sum_log1p(tile, float(highest), other)
            tile.div_(torch.add(tile, 1.0, out=other))
        for match in self.matches:
            weight = (match.image_to_text + match.text_to_image) / 2
            self._subtract(tile, rows, columns, match.text, weight)
        return loss, tile.sum(), tile

    def _subtract(
        self, tile: Tensor, rows: slice, columns: slice, text_B: Tensor, weight: float
    ) -> None:
        if not weight:
            return
        column_h = text_B[rows] + (self.own - columns.start)
        hit_k = ((column_h >= 0) & (column_h < tile.shape[1])).nonzero().squeeze(1)
        tile[hit_k, column_h[hit_k]] -= weight

    def add_products(
        self,
        rows: slice,
        columns: slice,
        excess: tuple[Tensor, Tensor],
        dimage_BD: Tensor,
        dtext_KD: Tensor,
    ) -> None:
        """dI_h += W·T_w by the first W_hw, dT_w += Wᵀ·I_h by the second."""
        dimage_BD[rows].addmm_(excess[0], self.text_KD[columns])
        dtext_KD[columns].addmm_(excess[1].t(), self.image_BD[rows])


def _sum_log1p(e_hw: Tensor, highest: float, spare_hw: Tensor) -> Tensor:
    """Σ log(1 + e) where e ≤ exp(highest), with a fraction of the logarithms, which are slow.

    (1 + a)(1 + b) = 1 + (a + b + ab) folds the rows by halves as long as nothing can overflow, and
    keeps the digits of small a and b, which 1 + a would lose.
    """
    total, factor = e_hw.new_zeros(()), max(highest, 0.0) + 1  # ≥ log(1 + e)
    source, place = e_hw, spare_hw
    while len(source) > 1 and 2 * factor < 80:
        half = len(source) // 2
        a, b = source[:half], source[half : 2 * half]
        if len(source) % 2:
            total += source[-1].log1p().sum()
        if source is e_hw:
            source = torch.add(a, b, out=place[:half]).addcmul_(a, b)
        else:
            source = a.addcmul_(a, b).add_(b)
        factor *= 2
    return total + source.log1p().sum()


def _exp_(x: Tensor) -> Tensor:
    """exp in place, no less than the least normal number: a CPU takes 200 times longer below it."""
    return x.mul_(_LOG2_E).clamp_(min=math.log2(torch.finfo(x.dtype).tiny)).exp2_()
