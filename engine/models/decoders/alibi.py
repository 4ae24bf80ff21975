"""ALiBi (arXiv 2108.12409) by positions that are given, where MPT counts places in a row."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class GivenAlibi:
    """Bends an MPT model's biases while in use; of other models ``is_needed`` is False.

    The bias of a head is its slope times the key's position: softmax takes no notice of a constant.
    """

    def __init__(self, base: Any) -> None:
        self.position_BS: Tensor | None = None  # of all keys; None: the model counts places
        self.plain = getattr(base, "build_mpt_alibi_tensor", None)
        self.is_needed = self.plain is not None
        if self.is_needed:
            base.build_mpt_alibi_tensor = self._biases

    @contextmanager
    def at(self, position_BS: Tensor) -> Iterator[None]:
        """Within the block, keys have these positions."""
        self.position_BS = position_BS
        try:
            yield
        finally:
            self.position_BS = None

    def _biases(self, num_heads: int, length: int, *args: Any, **kwargs: Any) -> Any:
        assert self.plain is not None
        if self.position_BS is None:
            return self.plain(num_heads, length, *args, **kwargs)
        two_H12 = self.plain(num_heads, 2, *args, **kwargs)
        slope_H1 = two_H12[..., 1] - two_H12[..., 0]
        return _ByRow(slope_H1[..., None] * self.position_BS[:, None, None])


class _ByRow:
    """Biases [B, H, 1, S] that pass for MPT's [H, 1, S], which are the same for all rows."""

    def __init__(self, bias_BH1S: Tensor) -> None:
        self.bias_BH1S = bias_BH1S
        self.shape = bias_BH1S.shape[1:]

    def size(self, dim: int) -> int:
        return self.shape[dim]

    def __getitem__(self, part: Any) -> Tensor:
        """The last heads, queries and keys, as MPT asks for them."""
        return self.bias_BH1S[(slice(None), *part)]

    def to(self, device: torch.device) -> _ByRow:
        return _ByRow(self.bias_BH1S.to(device))
