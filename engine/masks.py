"""One rule for what each position sees: image prefixes, captions, prompts and independent labels.

Position i sees position j where

    order_j ≤ order_i   and   segment_j ∈ {0, segment_i}   and both are valid,

with ``order`` the running sum of ``causal`` along the row. Positions of one block (``causal`` 0
after a block's first) see each other both ways; each position with ``causal`` 1 opens a new step of
time. Segment 0 is everybody's; other segments see only it and themselves.

    causal text         1 1 1 1 …
    GIT prefix          0 0 0 0 | 1 1 1 …       image tokens among themselves, text after them
    independent labels  0 0 0 0 | 1 1 | 1 1 | 1 1   with segments  0 0 0 0 | 0 0 | 1 1 | 2 2
"""

from __future__ import annotations

import torch
from torch import Tensor


def visible(
    causal_BT: Tensor,
    segment_BT: Tensor | None = None,
    valid_BT: Tensor | None = None,
    *,
    unseen_BT: Tensor | None = None,
    last: int | None = None,
) -> Tensor:
    """bool [B, T, T]: whether row i's query may see column j.

    A row that is not valid sees itself alone, since a softmax over nothing is NaN.

    Args:
        causal_BT: 1 where a position begins a new step of time, else 0.
        segment_BT: 0 for what all may see; absent: all 0.
        valid_BT: 0 for padding; absent: all valid.
        unseen_BT: 1 for what nobody may see, not even itself; absent: nothing is.
        last: the last so many queries alone, [B, last, T], of rows that are all valid.
    """
    order_BT = causal_BT.cumsum(1)
    queries = slice(None if last is None else -last, None)
    sees_BTT = order_BT[:, None, :] <= order_BT[:, queries, None]
    if segment_BT is not None:
        key, query = segment_BT[:, None, :], segment_BT[:, queries, None]
        sees_BTT = sees_BTT & ((key == 0) | (key == query))
    if unseen_BT is not None:
        sees_BTT = sees_BTT & ~unseen_BT.bool()[:, None, :]
    if valid_BT is not None:
        valid_BT = valid_BT.bool()
        itself_TT = torch.eye(valid_BT.shape[1], dtype=torch.bool, device=valid_BT.device)
        known_BTT = valid_BT[:, None, :] & valid_BT[:, :, None]
        sees_BTT = (sees_BTT & known_BTT) | (itself_TT & ~valid_BT[:, :, None])
    return sees_BTT


def additive(sees_BTT: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, 1, T, T] to be added to attention's scores: 0 where it sees, else the least value."""
    mask_BTT = torch.zeros(sees_BTT.shape, dtype=dtype, device=sees_BTT.device)
    return mask_BTT.masked_fill_(~sees_BTT, torch.finfo(dtype).min)[:, None]


def prefix(
    image_valid_BN: Tensor,
    valid_BT: Tensor,
    dtype: torch.dtype,
    *,
    segment_BT: Tensor | None = None,
    unseen_BT: Tensor | None = None,
) -> Tensor:
    """The additive mask [B, 1, N + T, N + T] of image tokens before a text (GIT, 2205.14100).

    Image tokens see each other, none of the text; text sees the image and what precedes it.
    ``image_valid_BN`` says which image tokens there are, ``valid_BT`` is the text's attention mask;
    ``segment_BT`` and ``unseen_BT`` are the text's, as for ``visible``.
    """
    image_BN = torch.zeros_like(image_valid_BN)

    def behind_image(part_BT: Tensor | None) -> Tensor | None:
        return None if part_BT is None else torch.cat([image_BN, part_BT], dim=1)

    sees_BTT = visible(
        torch.cat([image_BN, torch.ones_like(valid_BT)], dim=1),
        behind_image(segment_BT),
        torch.cat([image_valid_BN, valid_BT], dim=1),
        unseen_BT=behind_image(unseen_BT),
    )
    return additive(sees_BTT, dtype)
