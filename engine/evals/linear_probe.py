"""Linear probe: multinomial logistic regression on frozen features, computed once.

``lbfgs`` minimises Σ cross-entropy + λ/2·‖W‖² in fp64, with λ chosen by accuracy on a held-out
tenth of the training images, then fitted again on all (Radford et al. 2021, arXiv:2103.00020,
appendix A.3; λ is 1/C of scikit-learn). ``sgd`` trains by steps with a cosine schedule, on features
standardised by the training set's mean and variance (He et al. 2022, arXiv:2111.06377, appendix A).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from engine.config import schema
from engine.data.bad_samples import BadRecord
from engine.errors import FaultError, UserError
from engine.evals.encode import Encoded, Encoder
from engine.evals.labels import NamedLabels, class_names
from engine.evals.logistic import (
    OptimizerFactory,
    choose_regularisation,
    fit_lbfgs,
    fit_steps,
)
from engine.metrics import classification as metrics
from engine.types import Batch, Source


@dataclass
class LinearProbe:
    """What an evaluation found; equal on every rank."""

    metrics: dict[str, float]
    num_train: int
    num_valid: int
    regularisation: float | None  # λ chosen; None for sgd and lars
    bad: list[BadRecord]


def evaluate(
    encoder: Encoder,
    train: Source,
    valid: Source,
    config: schema.LinearProbe,
    *,
    encode: Callable[[Any, Batch], Tensor] | None = None,
    optimizer: OptimizerFactory | None = None,
    seed: int = 0,
) -> LinearProbe:
    """Accuracies of the probe on ``valid``, in percent.

    ``encode(model, batch)`` gives the features (default: the task's image features), ``optimizer``
    makes the optimizer of ``method`` sgd or lars from parameters and a learning rate. Every rank
    fits the same classifier. Raises UserError for images without labels and for different classes,
    FaultError for features that are not finite.
    """
    classes = [source.classes for source in (train, valid)]
    if classes[0] != classes[1]:
        raise UserError(
            f"datasets {train.name!r} and {valid.name!r} have different classes: "
            f"{_shown(classes[0])} and {_shown(classes[1])}",
            key="eval.linear_probe",
        )
    if classes[0] is None:
        numbers = {name: number for number, name in enumerate(class_names(train, valid))}
        train, valid = (NamedLabels(source, numbers, train.name) for source in (train, valid))
    sets = [
        encoder.images(source, np.arange(len(source)), encode=encode) for source in (train, valid)
    ]
    for source, images in zip((train, valid), sets, strict=True):
        _check(source, images)
    x, xv = (images.features for images in sets)
    y, yv = (images.labels.to(encoder.device) for images in sets)
    num_classes = int(max(y.max(), yv.max())) + 1
    chosen = None
    if config.method == "lbfgs":
        chosen = choose_regularisation(x, y, num_classes, config.regularisation, seed=seed)
        linear = fit_lbfgs(x, y, num_classes, chosen)
    else:
        linear = fit_steps(x, y, num_classes, config, optimizer=optimizer, seed=seed)
    values = metrics.from_ranks(metrics.label_ranks(linear(xv), yv).cpu(), yv.cpu())
    return LinearProbe(values, len(y), len(yv), chosen, sets[0].bad + sets[1].bad)


def _check(source: Source, images: Encoded) -> None:
    if not len(images.rows) or (images.labels < 0).any():
        what = "images without a label" if len(images.rows) else "no image that can be used"
        raise UserError(
            f"dataset {source.name!r} ({source.split}) has {what}; a linear probe needs labelled "
            "images (format: imagefolder, or a CSV with a column labels)",
            key="eval.linear_probe",
        )
    bad = (~images.features.isfinite()).any(1).nonzero().flatten().tolist()
    if bad:
        raise FaultError(
            f"linear probe on {source.name!r}: {len(bad)} image features are NaN or infinite, the "
            f"first of row {int(images.rows[bad[0]])}"
        )


def _shown(classes: Sequence[str] | None) -> str:
    if classes is None:
        return "none"
    return f"{len(classes)} ({', '.join(classes[:3])}{', …' if len(classes) > 3 else ''})"
