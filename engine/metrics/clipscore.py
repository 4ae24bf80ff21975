"""CLIPScore and RefCLIPScore from features (Hessel et al. 2021, https://arxiv.org/abs/2104.08718).

Features are arrays as a contrastive model gives them, of any length: they are normalised here, and
a feature of length zero has cosine 0 with everything. Scores are in 0 … 2.5, not in percent.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

WEIGHT = 2.5


def normalized(feature_ND: np.ndarray) -> np.ndarray:
    """Rows of unit length, in double precision. Raises ValueError for what is not finite."""
    feature_ND = np.asarray(feature_ND, dtype=np.float64)
    if feature_ND.ndim != 2:
        raise ValueError(f"features are [N, D], these have the shape {feature_ND.shape}")
    if not np.isfinite(feature_ND).all():
        row = int(np.argmin(np.isfinite(feature_ND).all(axis=1)))
        raise ValueError(f"features are not finite, the first in row {row}")
    length_N1 = np.linalg.norm(feature_ND, axis=1, keepdims=True)
    return feature_ND / np.where(length_N1 > 0, length_N1, 1)


def cosines(image_ND: np.ndarray, text_ND: np.ndarray) -> np.ndarray:
    """Cosine of each image with its text: float64 [N]. Raises ValueError for unequal shapes."""
    image_ND, text_ND = normalized(image_ND), normalized(text_ND)
    if image_ND.shape != text_ND.shape:
        raise ValueError(f"images are {image_ND.shape}, but texts {text_ND.shape}")
    return (image_ND * text_ND).sum(axis=1)


def ref_clip_score(
    score_N: np.ndarray, text_ND: np.ndarray, references: Sequence[np.ndarray]
) -> np.ndarray:
    """Harmonic mean of CLIPScore and the highest cosine with a reference, at least 0: [N].

    ``references`` holds each image's own references, [R, D] with R ≥ 1.
    """
    if len(references) != len(text_ND):
        raise ValueError(f"{len(text_ND)} texts, but references of {len(references)}")
    nearest_N = np.zeros(len(text_ND))
    for row, unit_D in enumerate(normalized(text_ND)):
        if len(references[row]) == 0:
            raise ValueError(f"text {row} has no reference")
        nearest_N[row] = max((normalized(references[row]) @ unit_D).max(), 0)
    total_N = score_N + nearest_N
    product_N = 2 * score_N * nearest_N
    return np.divide(product_N, total_N, out=np.zeros_like(total_N), where=total_N > 0)


def clip_scores(
    image_ND: np.ndarray, text_ND: np.ndarray, references: Sequence[np.ndarray] | None = None
) -> dict[str, float]:
    """Means over the images: CLIPScore (2.5 · max(cos, 0)), the raw cosine and, with references,
    RefCLIPScore. Raises ValueError where there is nothing to score.
    """
    if len(image_ND) == 0:
        raise ValueError("CLIPScore needs at least one image")
    cosine_N = cosines(image_ND, text_ND)
    score_N = WEIGHT * np.maximum(cosine_N, 0)
    means = {"CLIPScore": float(score_N.mean()), "CLIP_cosine": float(cosine_N.mean())}
    if references is not None:
        means["RefCLIPScore"] = float(ref_clip_score(score_N, text_ND, references).mean())
    return means
