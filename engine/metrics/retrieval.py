"""Image–text retrieval: recall at k and median rank both ways, from features alone.

Scores are cosines (dot products of the features as given), computed in fp64 and rounded to fp32, so
that they do not depend on how the work was cut into chunks or over ranks, and equal features score
equally. Ties are counted against the model: a wrong item that scores the same as the right one
ranks before it, so that features collapsed to a point score 0, not 100.

Shapes: ``image_ID`` [images, width], ``caption_CD`` [captions, width], ``caption_image_C`` the row
of ``image_ID`` that each caption belongs to. All figures in percent, ranks from 1.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

RECALL_AT = (1, 5, 10)
CHUNK_SIZE = 256
_LEVEL = 0.95  # of confidence intervals
_WAYS = ("image_to_text", "text_to_image")


def image_to_text_ranks(
    image_ID: Tensor, caption_CD: Tensor, caption_image_C: Tensor,
    queries: Sequence[int] | None = None,
) -> Tensor:  # fmt: skip
    """Rank of the best right caption for each image, or those of ``queries``; 0 where it has none.

    int64, on the CPU. Memory O(CHUNK_SIZE × captions). Raises ValueError for features that are not
    finite or do not fit together.
    """
    _check(image_ID, caption_CD, caption_image_C)
    caption_DC = caption_CD.double().T

    def ranks(row_B: Tensor) -> Tensor:
        score_BC = (image_ID[row_B].double() @ caption_DC).float()
        right_BC = caption_image_C == row_B[:, None]
        best_B1 = score_BC.masked_fill(~right_BC, -torch.inf).amax(1, keepdim=True)
        rank_B = 1 + ((score_BC >= best_B1) & ~right_BC).sum(1)
        return rank_B.masked_fill(~right_BC.any(1), 0)

    every = range(len(image_ID))
    return _in_chunks(ranks, every if queries is None else queries, image_ID.device)


def text_to_image_ranks(
    image_ID: Tensor, caption_CD: Tensor, caption_image_C: Tensor,
    queries: Sequence[int] | None = None,
) -> Tensor:  # fmt: skip
    """Rank of the right image for each caption, or those of ``queries``: int64, on the CPU.

    Memory O(CHUNK_SIZE × images). Raises ValueError as ``image_to_text_ranks`` does.
    """
    _check(image_ID, caption_CD, caption_image_C)
    image_DI = image_ID.double().T

    def ranks(row_B: Tensor) -> Tensor:
        score_BI = (caption_CD[row_B].double() @ image_DI).float()
        best_B1 = score_BI.gather(1, caption_image_C[row_B, None])
        return (score_BI >= best_B1).sum(1)  # the right image counts itself

    every = range(len(caption_CD))
    return _in_chunks(ranks, every if queries is None else queries, image_ID.device)


def _in_chunks(
    ranks: Callable[[Tensor], Tensor], queries: Sequence[int], device: torch.device
) -> Tensor:
    lows = range(0, len(queries), CHUNK_SIZE)
    parts = [torch.tensor(queries[low : low + CHUNK_SIZE], device=device) for low in lows]
    return torch.cat([torch.empty(0, dtype=torch.int64), *(ranks(part).cpu() for part in parts)])


def from_ranks(image_to_text: Tensor, text_to_image: Tensor) -> dict[str, float]:
    """Recall at 1, 5 and 10 both ways, RSUM (their sum), mean_R@1 and median ranks.

    A gallery smaller than k gives R@k = 100. Images without a caption (rank 0) are no queries.
    Raises ValueError where there is nothing to rank.
    """
    ranks = dict(zip(_WAYS, (image_to_text[image_to_text > 0], text_to_image), strict=True))
    if any(len(rank_Q) == 0 for rank_Q in ranks.values()):
        raise ValueError("retrieval needs at least one image and one caption of it")
    values = {
        f"{way}_R@{k}": 100 * (rank_Q <= k).double().mean().item()
        for way, rank_Q in ranks.items()
        for k in RECALL_AT
    }
    medians = {f"{way}_median_rank": float(np.median(rank_Q)) for way, rank_Q in ranks.items()}
    return _summed(values) | medians


def _summed(recalls: dict[str, Any]) -> dict[str, Any]:
    """Recalls (numbers or arrays of them) with RSUM and mean_R@1."""
    mean = (recalls["image_to_text_R@1"] + recalls["text_to_image_R@1"]) / 2
    return recalls | {"RSUM": sum(recalls.values()), "mean_R@1": mean}


def top_captions(image_ID: Tensor, caption_CD: Tensor, *, k: int = 3) -> tuple[Tensor, Tensor]:
    """The k best captions of each of a few images, best first: (scores [I, k], rows [I, k])."""
    score = (image_ID.double() @ caption_CD.double().T).float()
    top = score.topk(min(k, len(caption_CD)))
    return top.values.cpu(), top.indices.cpu()


@torch.no_grad()
def batch_recall(image_BD: Tensor, text_BD: Tensor, *, num_queries: int = 512) -> Tensor:
    """Image→text R@1 within a training batch, in percent: 0-d, on the device, no synchronisation.

    Row i's partner is row i. Only the first ``num_queries`` images ask, which bounds the cost at a
    large batch; all its texts answer. Ties count against the model.
    """
    image_QD = image_BD[:num_queries].detach().float()
    score = image_QD @ text_BD.detach().float().T
    wrong = (score >= score.diagonal()[:, None]).sum(1) > 1
    return 100 * (1 - wrong.float().mean())


def bootstrap(
    image_to_text: Tensor, text_to_image: Tensor, caption_image_C: Tensor, *,
    num_draws: int, seed: int = 0,
) -> dict[str, tuple[float, float]]:  # fmt: skip
    """95 % percentile confidence intervals of the recalls, RSUM and mean_R@1: name → (low, high).

    Queries are drawn again with replacement, image by image with all captions of each, because
    captions of one photograph are not independent; galleries stay as they are.
    """
    num_images, owner_C = len(image_to_text), caption_image_C.cpu().numpy()
    is_query_I = (image_to_text > 0).numpy()

    def hits(k: float) -> list[np.ndarray]:
        """Both ways' hits at k, by image."""
        texts = np.bincount(owner_C, (text_to_image <= k).numpy(), minlength=num_images)
        return [is_query_I & (image_to_text <= k).numpy(), texts]

    ks = (np.inf, *RECALL_AT)  # every query is a hit at infinity
    table_IH = np.stack([way for k in ks for way in hits(k)], axis=1).astype(float)
    generator = np.random.default_rng(seed)
    sums_NH = np.stack([
        np.bincount(generator.integers(0, num_images, num_images), minlength=num_images) @ table_IH
        for _ in range(num_draws)
    ])  # fmt: skip
    sums_NKW = sums_NH.reshape(num_draws, len(ks), len(_WAYS))
    with np.errstate(invalid="ignore"):  # a draw that holds no query at all is left out below
        shares_NKW = 100 * sums_NKW[:, 1:] / sums_NKW[:, :1]
    values = _summed({
        f"{way}_R@{k}": shares_NKW[:, row, column]
        for column, way in enumerate(_WAYS)
        for row, k in enumerate(RECALL_AT)
    })  # fmt: skip
    tails = (50 * (1 - _LEVEL), 50 * (1 + _LEVEL))
    bounds = {name: np.nanpercentile(draws, tails) for name, draws in values.items()}
    return {name: (float(low), float(high)) for name, (low, high) in bounds.items()}


def _check(image_ID: Tensor, caption_CD: Tensor, caption_image_C: Tensor) -> None:
    """Raises ValueError naming what does not fit or is not finite."""
    for name, features in (("image", image_ID), ("caption", caption_CD)):
        if features.dim() != 2:
            raise ValueError(f"{name} features must be [N, D], got {list(features.shape)}")
        bad = (~features.isfinite()).any(1).nonzero().flatten().tolist()
        if bad:
            raise ValueError(
                f"{len(bad)} of {len(features)} {name} features are NaN or infinite, "
                f"the first in row {bad[0]}"
            )
    if image_ID.shape[1] != caption_CD.shape[1]:
        raise ValueError(
            f"image features are {image_ID.shape[1]} wide, caption features {caption_CD.shape[1]}"
        )
    if len(caption_image_C) != len(caption_CD):
        raise ValueError(f"{len(caption_CD)} captions, but {len(caption_image_C)} image rows")
    outside = (caption_image_C < 0) | (caption_image_C >= len(image_ID))
    if outside.any():
        row = int(outside.nonzero()[0])
        raise ValueError(
            f"caption {row} belongs to image {int(caption_image_C[row])} of {len(image_ID)}"
        )
