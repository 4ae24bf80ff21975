"""Image–text retrieval: recall at k and median rank both ways, from features alone.

Scores are cosines (dot products of the features as given), computed in fp64 and rounded to fp32, so
that they do not depend on how the work was cut into chunks or over ranks, and equal features score
equally. Ties are counted against the model: a wrong item that scores the same as the right one
ranks before it, so that features collapsed to a point score 0, not 100.

Shapes: ``image_ID`` [images, width], ``caption_CD`` [captions, width], ``caption_image_C`` the row
of ``image_ID`` that each caption belongs to. All figures in percent, ranks from 1.
"""

import numpy as np
import torch
from torch import Tensor

RECALL_AT = (1, 5, 10)
CHUNK_SIZE = 256


def image_to_text_ranks(
    image_ID: Tensor,
    caption_CD: Tensor,
    caption_image_C: Tensor,
    *,
    start: int = 0,
    stop: int | None = None,
    chunk_size: int = CHUNK_SIZE,
) -> Tensor:
    """Rank of the best right caption for each image of [start, stop); 0 where it has no caption.

    int64 [stop - start], on the CPU. Memory O(chunk_size × captions). Raises ValueError for
    features that are not finite or do not fit together.
    """
    _check(image_ID, caption_CD, caption_image_C)
    stop = len(image_ID) if stop is None else stop
    caption_DC = caption_CD.double().T
    ranks = [torch.empty(0, dtype=torch.int64)]
    for low in range(start, stop, chunk_size):
        rows = torch.arange(low, min(low + chunk_size, stop), device=caption_image_C.device)
        score = (image_ID[rows].double() @ caption_DC).float()
        right = caption_image_C == rows[:, None]
        best = score.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
        rank = 1 + ((score >= best) & ~right).sum(1)
        ranks.append(rank.masked_fill(~right.any(1), 0).cpu())
    return torch.cat(ranks)


def text_to_image_ranks(
    image_ID: Tensor,
    caption_CD: Tensor,
    caption_image_C: Tensor,
    *,
    start: int = 0,
    stop: int | None = None,
    chunk_size: int = CHUNK_SIZE,
) -> Tensor:
    """Rank of the right image for each caption of [start, stop): int64, on the CPU.

    Memory O(chunk_size × images). Raises ValueError as ``image_to_text_ranks`` does.
    """
    _check(image_ID, caption_CD, caption_image_C)
    stop = len(caption_CD) if stop is None else stop
    image_DI = image_ID.double().T
    ranks = [torch.empty(0, dtype=torch.int64)]
    for low in range(start, stop, chunk_size):
        rows = slice(low, min(low + chunk_size, stop))
        score = (caption_CD[rows].double() @ image_DI).float()
        best = score.gather(1, caption_image_C[rows, None])
        ranks.append((score >= best).sum(1).cpu())  # the right image counts itself
    return torch.cat(ranks)


def from_ranks(image_to_text: Tensor, text_to_image: Tensor) -> dict[str, float]:
    """Recall at 1, 5 and 10 both ways, RSUM (their sum), mean_R@1 and median ranks.

    A gallery smaller than k gives R@k = 100. Images without a caption (rank 0) are no queries.
    Raises ValueError where there is nothing to rank.
    """
    directions = {
        "image_to_text": image_to_text[image_to_text > 0].double(),
        "text_to_image": text_to_image.double(),
    }
    if any(len(ranks) == 0 for ranks in directions.values()):
        raise ValueError("retrieval needs at least one image and one caption of it")
    values = {
        f"{way}_R@{k}": 100 * (ranks <= k).double().mean().item()
        for way, ranks in directions.items()
        for k in RECALL_AT
    }
    values["RSUM"] = sum(values.values())
    values["mean_R@1"] = (values["image_to_text_R@1"] + values["text_to_image_R@1"]) / 2
    for way, ranks in directions.items():
        values[f"{way}_median_rank"] = float(np.median(ranks.numpy()))
    return values


def retrieval(
    image_ID: Tensor, caption_CD: Tensor, caption_image_C: Tensor, *, chunk_size: int = CHUNK_SIZE
) -> dict[str, float]:
    """All retrieval figures of one gallery in one process: see ``from_ranks``."""
    features = (image_ID, caption_CD, caption_image_C)
    return from_ranks(
        image_to_text_ranks(*features, chunk_size=chunk_size),
        text_to_image_ranks(*features, chunk_size=chunk_size),
    )


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
    image_to_text: Tensor,
    text_to_image: Tensor,
    caption_image_C: Tensor,
    *,
    num_draws: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, tuple[float, float]]:
    """Percentile confidence intervals of the recalls, RSUM and mean_R@1: name → (low, high).

    Queries are drawn again with replacement, image by image with all captions of each, because
    captions of one photograph are not independent; galleries stay as they are.
    """
    num_images = len(image_to_text)
    owner = caption_image_C.cpu().numpy()
    hits = {"image_to_text": (image_to_text > 0).double().numpy()}
    hits["text_to_image"] = np.bincount(owner, minlength=num_images).astype(float)
    for k in RECALL_AT:
        right = ((image_to_text > 0) & (image_to_text <= k)).double().numpy()
        hits[f"image_to_text_R@{k}"] = right
        right = (text_to_image <= k).double().numpy()
        hits[f"text_to_image_R@{k}"] = np.bincount(owner, right, minlength=num_images)
    table = np.stack(list(hits.values()), axis=1)
    generator = np.random.default_rng(seed)
    drawn = np.stack([
        np.bincount(generator.integers(0, num_images, num_images), minlength=num_images) @ table
        for _ in range(num_draws)
    ])  # fmt: skip
    sums = dict(zip(hits, drawn.T, strict=True))
    with np.errstate(invalid="ignore"):  # a draw that holds no query at all is left out below
        values = {
            f"{way}_R@{k}": 100 * sums[f"{way}_R@{k}"] / sums[way]
            for way in ("image_to_text", "text_to_image")
            for k in RECALL_AT
        }
    values["RSUM"] = np.sum(list(values.values()), axis=0)
    values["mean_R@1"] = (values["image_to_text_R@1"] + values["text_to_image_R@1"]) / 2
    tails = (50 * (1 - level), 50 * (1 + level))
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
