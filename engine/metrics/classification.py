"""Classification accuracy from scores: at 1, at 5, and the mean over classes, in percent."""

import torch
from torch import Tensor

ACCURACY_AT = (1, 5)


def label_ranks(score_BK: Tensor, label_B: Tensor) -> Tensor:
    """Rank of the right class in each row, from 1: int64 [B]; ties count against the model.

    Raises ValueError for scores that are NaN and for labels outside the K classes.
    """
    num_classes = score_BK.shape[1]
    if score_BK.isnan().any():
        row = int(score_BK.isnan().any(1).nonzero()[0])
        raise ValueError(f"scores are NaN, the first in row {row}")
    outside = (label_B < 0) | (label_B >= num_classes)
    if outside.any():
        row = int(outside.nonzero()[0])
        raise ValueError(f"row {row} has label {int(label_B[row])}, but classes are {num_classes}")
    return (score_BK >= score_BK.gather(1, label_B[:, None])).sum(1)


def from_ranks(rank_N: Tensor, label_N: Tensor) -> dict[str, float]:
    """accuracy@1, accuracy@5 (100 where classes are at most 5) and mean_per_class_accuracy.

    The last is over the classes that occur. Raises ValueError where there is nothing to count.
    """
    if len(rank_N) == 0:
        raise ValueError("accuracy needs at least one labelled image")
    values = {f"accuracy@{k}": 100 * (rank_N <= k).double().mean().item() for k in ACCURACY_AT}
    right, count = torch.bincount(label_N, (rank_N <= 1).double()), torch.bincount(label_N)
    seen = count > 0
    values["mean_per_class_accuracy"] = 100 * (right[seen] / count[seen]).mean().item()
    return values
