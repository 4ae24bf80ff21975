"""The arithmetic of one tile of similarities, so that no loss ever holds the whole matrix.

A tile is z_hw = scale · I_h·T_wᵀ (+ bias) for some rows (images) and columns (texts), in fp32, or
fp64 where the features are. ``Tiles`` works in place in one buffer, with as few passes over it as
can be.
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

    def weight(self, to_text: float = 0.5, to_image: float = 0.5) -> float:
        return to_text * self.image_to_text + to_image * self.text_to_image


def compute_dtype(feature: Tensor) -> torch.dtype:
    """fp64 for fp64 features, else fp32."""
    return torch.float64 if feature.dtype == torch.float64 else torch.float32


def slices(length: int, size: int) -> Iterator[slice]:
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


Tile = tuple[slice, slice]
"""Rows (images) and columns (texts) of the similarities."""


class Tiles:
    """This rank's rows against a block of columns, tile after tile, with eager operations.

    ``matches`` are columns of the block from ``own`` on (they may be outside of it); a tile has at
    most ``rows`` rows. What a method returns may be in the memory of the next call's tile.
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
    ) -> None:
        self.image_BD, self.text_KD = (x.to(compute_dtype(x)) for x in (image_BD, text_KD))
        self.scale, self.bias, self.matches, self.own = scale, bias, matches, own
        # larger ones on a GPU: there is no cache to stay in, but launches cost
        height, width = (4096, 8192) if image_BD.is_cuda else (1024, 2048)
        self.shape = min(rows or height, len(image_BD)), min(width, len(text_KD))
        self._buffers: dict[int, Tensor] = {}
        self._bounded = self._exp_is_bounded()

    def _exp_is_bounded(self) -> bool:
        """Whether exp(z) and its sums neither overflow nor underflow, as |z| ≤ scale·‖I‖·‖T‖."""
        if self.image_BD.is_cuda or not min(self.shape):
            return False  # on a GPU reading the norms would make the host wait
        longest_I, longest_T = (x.norm(dim=1).max() for x in (self.image_BD, self.text_KD))
        largest = float(self.scale * longest_I * longest_T)
        limits = torch.finfo(self.image_BD.dtype)
        most_terms = max(len(self.image_BD), len(self.text_KD))
        return largest < min(-math.log(limits.tiny), math.log(limits.max / most_terms))

    def __iter__(self) -> Iterator[Tile]:
        for rows in slices(len(self.image_BD), self.shape[0] or 1):
            for columns in slices(len(self.text_KD), self.shape[1] or 1):
                yield rows, columns

    def _buffer(self, number: int, at: Tile) -> Tensor:
        """A tile's memory, made when first used; smaller tiles at the edges take its front."""
        if number not in self._buffers:
            self._buffers[number] = self.image_BD.new_empty(self.shape[0] * self.shape[1])
        height, width = (part.stop - part.start for part in at)
        return self._buffers[number][: height * width].view(height, width)

    def _logits(self, at: Tile, unit: float = 1.0) -> Tensor:
        tile, (rows, columns) = self._buffer(0, at), at
        torch.mm(self.image_BD[rows] * (self.scale * unit), self.text_KD[columns].t(), out=tile)
        return tile if self.bias is None else tile.add_(self.bias, alpha=unit)

    def _exponentials(self, at: Tile) -> Tensor:
        """exp(z) where that is bounded; a power of two costs a CPU a third of exp's time."""
        return self._logits(at, unit=_LOG2_E).exp2_()

    def log_sums(self, at: Tile) -> tuple[Tensor, Tensor]:
        """log Σ exp(z) of the tile's rows [h] and of its columns [w], from one product.

        Where exp(z) is bounded, one exponential serves both. Else rows and columns each have their
        own maxima subtracted: a column far below its rows' maxima would vanish in their scale.
        """
        if self._bounded:
            tile = self._exponentials(at)
            return tile.sum(1).log_(), tile.sum(0).log_()
        tile = self._logits(at)
        shifted, sums = self._buffer(1, at), []
        for dim in (1, 0):
            peak = tile.amax(dim, keepdim=True)
            _exp_(torch.sub(tile, peak, out=shifted))
            sums.append(shifted.sum(dim).log_().add_(peak.squeeze(dim)))
        return sums[0], sums[1]

    def softmax_dlogits(
        self, at: Tile, row_h: Tensor, column_w: Tensor, uniform: float, *, mutual: bool
    ) -> tuple[Tensor, Tensor]:
        """P − Y of the tile in each direction (image to text, text to image).

        P are softmaxes by the log-sums of whole rows and columns; Y has the matches, and
        ``uniform`` everywhere. Y is subtracted in full precision: near convergence P ≈ Y.
        ``mutual``: the sum over both directions, twice; one exponential where that is bounded.
        """
        other = self._buffer(1, at)
        if self._bounded:
            tile = self._exponentials(at)
            by_row, by_column = (-row_h).exp()[:, None], (-column_w).exp()
            if mutual:
                tile.mul_(torch.add(by_row, by_column, out=other))
                self._subtract_matches(tile, at, 1.0, 1.0, 2 * uniform)
                return tile, tile
            torch.mul(tile, by_column, out=other)
            tile.mul_(by_row)
        else:
            tile = self._logits(at)
            _exp_(torch.sub(tile, column_w, out=other))
            _exp_(tile.sub_(row_h[:, None]))
        self._subtract_matches(tile, at, 1.0, 0.0, uniform)
        self._subtract_matches(other, at, 0.0, 1.0, uniform)
        return (tile.add_(other),) * 2 if mutual else (tile, other)

    def sigmoid_dlogits(self, at: Tile) -> tuple[Tensor, Tensor, Tensor]:
        """Σ softplus(z), Σ (σ(z) − Y), and σ(z) − Y of the tile; Y as the directions' mean."""
        tile = self._logits(at)
        if tile.is_cuda or float(highest := tile.max()) > 40:
            loss = F.softplus(tile, threshold=50.0).sum()
            tile.sigmoid_()
        else:
            _exp_(tile)
            other = self._buffer(1, at)
            loss = _sum_log1p(tile, float(highest), other)
            tile.div_(torch.add(tile, 1.0, out=other))
        self._subtract_matches(tile, at, 0.5, 0.5)
        return loss, tile.sum(), tile

    def _subtract_matches(
        self, tile: Tensor, at: Tile, to_text: float, to_image: float, uniform: float = 0.0
    ) -> None:
        """Subtract Y, its two directions weighted so, and ``uniform`` everywhere."""
        rows, columns = at
        for match in self.matches:
            if weight := match.weight(to_text, to_image):
                column_h = match.text[rows] + (self.own - columns.start)
                hit_k = ((column_h >= 0) & (column_h < tile.shape[1])).nonzero().squeeze(1)
                tile[hit_k, column_h[hit_k]] -= weight
        if uniform:
            tile.sub_(uniform)

    def add_products(
        self, at: Tile, dlogits: tuple[Tensor, Tensor], dimage_BD: Tensor, dtext_KD: Tensor
    ) -> None:
        """dI_h += W·T_w by the first W_hw, dT_w += Wᵀ·I_h by the second."""
        rows, columns = at
        dimage_BD[rows].addmm_(dlogits[0], self.text_KD[columns])
        dtext_KD[columns].addmm_(dlogits[1].t(), self.image_BD[rows])


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
