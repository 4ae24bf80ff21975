"""Cross-entropy of next tokens, with logits at supervised positions alone.

Most positions of a captioning batch are prompt or padding. Their states are dropped before the
head, and torch's fused head and loss never holds all logits of the rest.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100  # label of a position that is not supervised


def token_losses(
    hidden_BTD: Tensor,
    labels_BT: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None = None,
    *,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """(−log p of all supervised tokens in row-major order [S], their rows [S]); fp32 or wider.

    ``hidden_BTD`` at position t predicts ``labels_BT`` at t; −100 is not supervised.
    """
    at_BT = labels_BT != IGNORED
    hidden_SD, label_S = hidden_BTD[at_BT], labels_BT[at_BT]
    rows_S = at_BT.nonzero()[:, 0]
    if not len(label_S):  # with a graph, so that every rank's backward reaches the same parameters
        nothing = hidden_SD.sum(1) + 0.0 * weight_VD[:1].sum()
        return nothing.to(_wide(nothing.dtype)), rows_S
    with torch.autocast(hidden_SD.device.type, enabled=False):
        weight_VD = weight_VD.to(hidden_SD.dtype)
        loss_S = F.linear_cross_entropy(
            hidden_SD,
            weight_VD,
            label_S,
            linear_bias=None if bias_V is None else bias_V.to(hidden_SD.dtype),
            reduction="none",
            label_smoothing=label_smoothing,
        )
    return loss_S.to(_wide(loss_S.dtype)), rows_S


def row_losses(
    hidden_BTD: Tensor,
    labels_BT: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None = None,
    *,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Σ over each row's supervised tokens of −log p, [B]."""
    loss_S, rows_S = token_losses(
        hidden_BTD, labels_BT, weight_VD, bias_V, label_smoothing=label_smoothing
    )
    return loss_S.new_zeros(len(labels_BT)).index_add(0, rows_S, loss_S)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
