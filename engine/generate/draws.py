"""Sampling whose draws hang on the seed and the image, not on which images share a batch.

torch's generator serves a batch row after row, so that other rows, or other processes, would give
an image another text. Here every text has random numbers of its own, one a token, and each finds
its token by the inverse of the cumulated probabilities: a number for a token, not one for each of
the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

import engine.torchvision_ops  # noqa: F401  before transformers, which imports torchvision

import transformers  # isort: skip
from engine.data.permutation import hash64


def uniforms(seed: int, rows: Sequence[int], num_texts: int, num_tokens: int) -> Tensor:
    """Numbers in [0, 1), fp64 [len(rows) · num_texts, num_tokens], the texts of a row together.

    Those of a row's k-th text are the same whatever else is asked for: each text has a splitmix64
    (Steele et al. 2014) of its own, which begins at a hash of (seed, row, k).
    """
    starts = [hash64(seed, row, text) for row in rows for text in range(num_texts)]
    steps = np.arange(1, num_tokens + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    state_BT = np.array(starts, dtype=np.uint64)[:, None] + steps
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        state_BT = (state_BT ^ state_BT >> np.uint64(shift)) * np.uint64(factor)
    state_BT ^= state_BT >> np.uint64(31)
    return torch.from_numpy((state_BT >> np.uint64(11)) * 2.0**-53)


class Draw(transformers.LogitsProcessor):
    """Leaves each row the one token that its next number chooses, at probability 1.

    ``uniform_BT`` is used up from the left, a column a call. It must stand behind whatever else
    changes the scores.
    """

    def __init__(self, uniform_BT: Tensor) -> None:
        self._columns = iter(uniform_BT.split(1, dim=1))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [B, V] → 0 at the drawn token, −∞ elsewhere."""
        uniform_B1 = next(self._columns)
        # fp64: in fp32 a token of less than 6e-8 could not be drawn at all
        cumulated_BV = scores.softmax(-1, dtype=torch.float64).cumsum(-1)
        place_B1 = uniform_B1 * cumulated_BV[:, -1:]
        token_B1 = torch.searchsorted(cumulated_BV, place_B1, right=True)
        # scores that are no numbers point behind the vocabulary
        token_B1 = token_B1.clamp_max(scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, token_B1, 0.0)


def processors(
    uniform_BT: Tensor, *, temperature: float, top_k: int, top_p: float
) -> transformers.LogitsProcessorList:
    """Temperature, top-k and top-p in the order of transformers' ``generate``, then the draw."""
    found = transformers.LogitsProcessorList()
    if temperature != 1:
        found.append(transformers.TemperatureLogitsWarper(temperature))
    if top_k:
        found.append(transformers.TopKLogitsWarper(top_k))
    if top_p < 1:
        found.append(transformers.TopPLogitsWarper(top_p))
    found.append(Draw(uniform_BT))
    return found
