"""Scores of recognised labels: precision, recall and F1 at k, average precision, PR curves.

Everything here is about lists and arrays; figures are shares of 1.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import numpy as np


class Scores(NamedTuple):
    """Means over images, F1 too: that of each image counts."""

    precision: float
    recall: float
    f1: float


class Curve(NamedTuple):
    """Precision and recall of all predictions at least as sure as each one, surest first."""

    precision: np.ndarray
    recall: np.ndarray


def exact(
    predicted: Sequence[Sequence[str]],
    true: Sequence[Collection[str]],
    k: int,
    same: Callable[[str], str] = str.lower,
) -> Scores:
    """Labels among the first ``k`` that are right word for word, as ``same`` writes them.

    An image has at least one true label. Of fewer predictions than k, precision is of these; of
    none it is 0.
    """
    per_image = []
    for labels, wanted in zip(predicted, true, strict=True):
        chosen, right = {same(label) for label in labels[:k]}, {same(label) for label in wanted}
        hits = len(chosen & right)
        per_image.append((hits / max(len(chosen), 1), hits / len(right)))
    return _means(per_image)


def semantic(similarities: Sequence[np.ndarray], k: int) -> Scores:
    """By likeness of meaning (NXTP, arXiv 2312.02142, section 4): for each image a matrix of
    cosines [true labels, predicted labels].

    Recall is the mean over true labels of the best match among the first ``k`` predictions,
    precision the mean over these of the best match among true labels.
    """
    per_image = []
    for matrix in similarities:
        first = matrix[:, :k]
        best = [first.max(axis=axis).mean() if first.size else 0.0 for axis in (0, 1)]
        per_image.append((float(best[0]), float(best[1])))
    return _means(per_image)


def _means(per_image: Sequence[tuple[float, float]]) -> Scores:
    """Of (precision, recall) of each image; F1 is 0 unless both are above it, as cosines need
    not be: with signs that differ it would know no bound."""
    f1 = [2 * p * r / (p + r) if min(p, r) > 0 else 0.0 for p, r in per_image]
    precision, recall = (float(np.mean([pair[i] for pair in per_image])) for i in (0, 1))
    return Scores(precision, recall, float(np.mean(f1)))


def average_precision(score_N: np.ndarray, is_true_N: np.ndarray) -> float:
    """Σ (Rₙ − Rₙ₋₁) Pₙ over falling thresholds; equal scores share one. NaN where none is true."""
    num_true = int(is_true_N.sum())
    if not num_true:
        return float("nan")
    hits, counts = _at_thresholds(score_N, is_true_N)
    gained = np.diff(hits, prepend=0)
    return float((gained * hits / counts).sum() / num_true)


def _at_thresholds(score_N: np.ndarray, is_true_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How many true ones, and how many in all, score at least each threshold, highest first."""
    order = np.argsort(-score_N, kind="stable")
    score_N, hits_N = score_N[order], np.cumsum(is_true_N[order])
    last = np.append(score_N[1:] != score_N[:-1], True)  # of each run of equal scores
    return hits_N[last], np.flatnonzero(last) + 1


def mean_average_precision(score_NC: np.ndarray, is_true_NC: np.ndarray) -> float:
    """Mean over the classes that any image has; NaN where no image has one."""
    each = [average_precision(*columns) for columns in zip(score_NC.T, is_true_NC.T, strict=True)]
    kept = [one for one in each if not np.isnan(one)]
    return float(np.mean(kept)) if kept else float("nan")


def curve(
    predicted: Sequence[Sequence[tuple[str, float]]], true: Sequence[Collection[str]]
) -> Curve:
    """Over all images' (label, probability) together, word for word; empty without predictions.

    Of an image's labels that differ in case alone the first counts.
    """
    pairs, num_true = [], 0
    for labels, wanted in zip(predicted, true, strict=True):
        right = {label.lower() for label in wanted}
        num_true += len(right)
        first: dict[str, float] = {}
        for label, prob in labels:
            first.setdefault(label.lower(), prob)
        pairs += [(prob, label in right) for label, prob in first.items()]
    if not pairs:
        return Curve(np.zeros(0), np.zeros(0))
    prob_N, right_N = (np.asarray(column) for column in zip(*pairs, strict=True))
    hits, counts = _at_thresholds(prob_N, right_N)
    return Curve(hits / counts, hits / num_true)
