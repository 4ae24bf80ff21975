"""Labels of images in one go (NXTP, arXiv 2312.02142, section 3.4), in NumPy.

As ``engine.generate.one_shot``: the k likeliest first tokens behind the prompt begin k labels, each
of which is gone on with, side by side with the others and unseen by them, by its likeliest tokens
to the separator. A label's probability is the product over its tokens, the separator included.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engine.export.onnx_session import Reading


@dataclass(frozen=True, slots=True)
class Found:
    """A label's tokens without its separator, and log p of them and the separator."""

    ids: tuple[int, ...]
    log_p: float


def one_shot(
    logits_BV: np.ndarray,
    reading: Reading,
    *,
    prompt_length: int,
    separator_id: int,
    num_first: int,
    room: int,
    rows: int,
) -> list[list[Found]]:
    """Each image's labels, the likelier first token first; ``rows`` of them at a time.

    ``logits_BV`` follow the prompt. A label of more than ``room`` tokens, its separator included,
    is left out.
    """
    first_BV = log_softmax(logits_BV)
    first_BV[:, separator_id] = -np.inf
    ids_BK = np.argsort(-first_BV, axis=1, kind="stable")[:, :num_first]
    log_p_BK = np.take_along_axis(first_BV, ids_BK, axis=1)
    found: list[list[Found]] = [[] for _ in ids_BK]
    for start in range(0, num_first, rows):
        part = slice(start, start + rows)
        complete = _finish(
            reading, ids_BK[:, part], log_p_BK[:, part],
            start=prompt_length, separator_id=separator_id, room=room,
        )  # fmt: skip
        for labels, more in zip(found, complete, strict=True):
            labels += more
    return found


def _finish(
    reading: Reading, first_BK: np.ndarray, log_p_BK: np.ndarray,
    *, start: int, separator_id: int, room: int,
) -> list[list[Found]]:  # fmt: skip
    """Labels from their first tokens on, which stand at the position ``start``."""
    num_images, num_labels = first_BK.shape
    ids_BKT = np.full((num_images, num_labels, room), separator_id)
    ids_BKT[..., 0] = first_BK
    log_p_BK = log_p_BK.copy()
    active_BA = np.broadcast_to(np.arange(num_labels), first_BK.shape)
    ended_BK = np.zeros(first_BK.shape, bool)
    for step in range(1, room):
        last_BA = np.take_along_axis(ids_BKT[..., step - 1], active_BA, axis=1)
        logits_BAV, reading = reading.go_on(
            last_BA,
            segment_ids=active_BA + 1,
            position_ids=np.full_like(last_BA, start + step - 1),
        )
        next_BAV = log_softmax(logits_BAV)
        token_BA = next_BAV.argmax(-1)
        more_BA = np.take_along_axis(next_BAV, token_BA[..., None], axis=2)[..., 0]
        going_BA = ~np.take_along_axis(ended_BK, active_BA, axis=1)
        token_BA = np.where(going_BA, token_BA, separator_id)
        np.put_along_axis(ids_BKT[..., step], active_BA, token_BA, axis=1)
        so_far_BA = np.take_along_axis(log_p_BK, active_BA, axis=1)
        np.put_along_axis(log_p_BK, active_BA, so_far_BA + np.where(going_BA, more_BA, 0), axis=1)
        np.put_along_axis(ended_BK, active_BA, token_BA == separator_id, axis=1)
        num_active = int((~ended_BK).sum(1).max())
        if num_active == 0:
            break
        # as many columns as the image with most needs, those to go on first
        active_BA = np.argsort(ended_BK, axis=1, kind="stable")[:, :num_active]
    return [
        [
            Found(tuple(ids[: ids.index(separator_id)]), log_p)
            for ids, log_p, ended in zip(*rows, strict=True)
            if ended
        ]
        for rows in zip(ids_BKT.tolist(), log_p_BK.tolist(), ended_BK.tolist(), strict=True)
    ]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """log p along the last axis."""
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
