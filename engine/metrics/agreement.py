"""How well a metric's scores agree with people's, and with which image or text belongs.

Scores are numbers one an item, as arrays [N]. None of the functions takes NaN: ValueError.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
MAX_PAIRS = 5_000_000  # of pairwise accuracy: above it pairs are drawn


def pearson(score: ArrayLike, human: ArrayLike) -> float:
    """Pearson's correlation; NaN where either side is constant or there are no two items."""
    x, y = _both(score, human)
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan")
    # scaled by the largest magnitude, so that squares neither overflow nor vanish
    x, y = ((v - v.mean()) / np.abs(v - v.mean()).max() for v in (x, y))
    return float(np.clip(x @ y / np.sqrt((x @ x) * (y @ y)), -1, 1))


def kendall_tau_b(score: ArrayLike, human: ArrayLike) -> float:
    """Kendall's τ-b, which allows for ties on both sides; NaN where ``pearson`` is.

    O(n log² n): discordant pairs are the inversions of one side once the other is sorted (Knight
    1966).
    """
    x, y = (np.unique(v, return_inverse=True)[1] for v in _both(score, human))
    if len(x) < 2:
        return float("nan")
    num_pairs = _pairs(len(x))
    tied_x, tied_y = (int(_pairs(np.bincount(v)).sum()) for v in (x, y))
    joint = np.unique(x * (y.max() + 1) + y, return_counts=True)[1]
    tied_both = int(_pairs(joint).sum())
    discordant = _inversions(y[np.lexsort((y, x))])
    difference = num_pairs - tied_x - tied_y + tied_both - 2 * discordant
    free_x, free_y = num_pairs - tied_x, num_pairs - tied_y
    if free_x == 0 or free_y == 0:
        return float("nan")
    return difference / float(np.sqrt(free_x) * np.sqrt(free_y))


def _pairs(count: Any) -> Any:
    return count * (count - 1) // 2


def _inversions(rank_N: NDArray[np.int64]) -> int:
    """Pairs i < j with rank_i > rank_j, of whole numbers from 0: one pass a bit, highest first.

    Of numbers that share their higher bits, each one bit before a zero bit is an inversion.
    """
    total, rest = 0, rank_N
    for bit in reversed(range(int(rank_N.max()).bit_length())):
        group, is_one = rest >> (bit + 1), (rest >> bit) & 1
        before = np.cumsum(is_one) - is_one
        starts = np.flatnonzero(np.diff(group, prepend=-1))
        in_group = before - np.repeat(before[starts], np.diff(starts, append=len(rest)))
        total += int(in_group[is_one == 0].sum())
        rest = rest[np.argsort(rest >> bit, kind="stable")]
    return total


def pairwise_accuracy(
    score: ArrayLike, human: ArrayLike, groups: Sequence[Any] | None = None
) -> dict[str, Any]:
    """Share of pairs of items that a score orders, or ties, as people do: acc*_eq.

    Deutsch et al. 2023, "Ties Matter": the score ties where two differ by ε at most, and ε is that
    which gives the highest accuracy, the smallest of several. ``groups`` compares items only within
    their group and averages over the groups that have pairs. Above MAX_PAIRS pairs, so many are
    drawn. Without ties, scores tie where they are equal. Raises ValueError where there is no pair.
    """
    x, y = _both(score, human)
    first, second, weight, drawn = _chosen_pairs(len(x), groups)
    gap, human_gap = x[first] - x[second], np.sign(y[first] - y[second])
    size, tied, alike = np.abs(gap), human_gap == 0, gap * human_gap > 0

    def accuracy(epsilon: float) -> float:
        right = np.where(tied, size <= epsilon, alike & (size > epsilon))
        return float(weight[right].sum() / weight.sum())

    epsilon = _best_epsilon(size, tied, alike, weight)
    return {
        "pairwise_accuracy": accuracy(epsilon),
        "pairwise_accuracy_without_ties": accuracy(0.0),
        "tie_epsilon": epsilon,
        "pairs_compared": len(first),
        "pairs_drawn": drawn,
    }


def _best_epsilon(
    size: Floats, tied: NDArray[np.bool_], alike: NDArray[np.bool_], weight: Floats
) -> float:
    """The smallest of the best limits: a larger one wins tied pairs, and loses others."""
    order = np.flatnonzero(tied | alike)
    order = order[np.argsort(size[order], kind="stable")]
    if len(order) == 0:
        return 0.0
    won = np.cumsum(np.where(tied[order], weight[order], -weight[order]))
    last = np.flatnonzero(np.diff(size[order], append=np.inf))  # of each run of equal gaps
    best = last[np.argmax(won[last])]
    return float(size[order][best]) if won[best] > 0 else 0.0


def _chosen_pairs(
    num_items: int, groups: Sequence[Any] | None
) -> tuple[NDArray[np.int64], NDArray[np.int64], Floats, bool]:
    """Rows of the pairs' items, weights that make groups count alike, whether pairs were drawn."""
    if groups is None:
        parts = [np.arange(num_items)]
    elif len(groups) != num_items:
        raise ValueError(f"{num_items} items, but {len(groups)} groups")
    else:
        codes = np.unique(np.asarray(groups), return_inverse=True)[1]
        parts = np.split(np.argsort(codes, kind="stable"), np.cumsum(np.bincount(codes))[:-1])
    parts = [part for part in parts if len(part) > 1]
    if not parts:
        raise ValueError("there is no pair of items to compare")
    generator, limit, drawn = np.random.default_rng(0), max(1, MAX_PAIRS // len(parts)), False
    found = []
    for part in parts:
        if _pairs(len(part)) <= limit:
            first, second = np.triu_indices(len(part), 1)
        else:
            drawn = True
            first = generator.integers(0, len(part), limit)
            second = (first + generator.integers(1, len(part), limit)) % len(part)
        weight = np.full(len(first), 1.0 if len(parts) == 1 else 1 / len(first))
        found.append((part[first], part[second], weight))
    firsts, seconds, weights = (np.concatenate(column) for column in zip(*found, strict=True))
    return firsts, seconds, weights, drawn


def winoground(score_N22: ArrayLike) -> dict[str, float]:
    """Text, image and group score in percent (Thrush et al. 2022); ties are wrong.

    ``score_N22[n, i, j]`` is of image i and caption j of item n, of which those with i = j belong
    together. Text: each image scores its own caption higher; image: each caption its own image.
    """
    s = _finite("scores", score_N22)
    if s.ndim != 3 or s.shape[1:] != (2, 2) or not len(s):
        raise ValueError(f"Winoground takes scores [items, 2 images, 2 captions], not {s.shape}")
    text = (s[:, 0, 0] > s[:, 0, 1]) & (s[:, 1, 1] > s[:, 1, 0])
    image = (s[:, 0, 0] > s[:, 1, 0]) & (s[:, 1, 1] > s[:, 0, 1])
    shares = {"text": text, "image": image, "group": text & image}
    return {name: 100 * float(right.mean()) for name, right in shares.items()}


def positive_over_negative(
    positive: ArrayLike, negative: ArrayLike, kinds: Sequence[str]
) -> dict[str, float]:
    """Share in percent of items whose right caption scores higher than the wrong one, by kind.

    The accuracy of SugarCrepe (Hsieh et al. 2023); ties are wrong. ``overall`` is over all items,
    ``mean`` over kinds. Raises ValueError where there is no item.
    """
    right = np.subtract(*_both(positive, negative)) > 0
    if len(kinds) != len(right) or not len(right):
        raise ValueError(f"{len(right)} items, but {len(kinds)} kinds")
    named = np.asarray(kinds)
    by_kind = {kind: 100 * float(right[named == kind].mean()) for kind in dict.fromkeys(kinds)}
    mean = float(np.mean(list(by_kind.values())))
    return {"overall": 100 * float(right.mean()), "mean": mean} | by_kind


def _both(first: ArrayLike, second: ArrayLike) -> tuple[Floats, Floats]:
    x, y = _finite("scores", first), _finite("the other scores", second)
    if x.ndim != 1 or x.shape != y.shape:
        raise ValueError(f"scores are of one length, not {list(x.shape)} and {list(y.shape)}")
    return x, y


def _finite(name: str, values: ArrayLike) -> Floats:
    found = np.asarray(values, dtype=np.float64)
    if not np.isfinite(found).all():
        raise ValueError(
            f"{name} are not all finite: the first that is not is "
            f"{np.argwhere(~np.isfinite(found))[0].tolist()}"
        )
    return found
