"""Linear probe: multinomial logistic regression on frozen features, computed once.

``lbfgs`` minimises Σ cross-entropy + λ/2·‖W‖² in fp64, with λ chosen by accuracy on a held-out
tenth of the training images, then fitted again on all (Radford et al. 2021, arXiv:2103.00020,
appendix A.3; λ is 1/C of scikit-learn). ``sgd`` trains by steps with a cosine schedule, on features
standardised by the training set's mean and variance (He et al. 2022, arXiv:2111.06377, appendix A).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.config import schema
from engine.data.bad_samples import BadRecord
from engine.errors import FaultError, UserError
from engine.evals.encode import Encoded, Encoder
from engine.metrics import classification as metrics
from engine.types import Batch, Source

OptimizerFactory = Callable[[Iterable[nn.Parameter], float], torch.optim.Optimizer]

_HELD_OUT = 10  # one of so many training images of a class chooses λ
_CHUNK = 8192  # rows turned into fp64 at once
_MAX_ITERATIONS = 1000
_MOMENTUM = 0.9


@dataclass
class LinearProbe:
    """What an evaluation found; equal on every rank."""

    metrics: dict[str, float]
    num_train: int
    num_valid: int
    regularisation: float | None  # λ chosen; None for sgd and lars
    bad: list[BadRecord]


@dataclass(frozen=True)
class Linear:
    """A linear classifier: scores = features · weight + bias."""

    weight: Tensor  # [D, K]
    bias: Tensor  # [K]

    def __call__(self, feature_ND: Tensor) -> Tensor:
        chunks = feature_ND.split(_CHUNK)
        return torch.cat([x.to(self.weight) @ self.weight + self.bias for x in chunks])


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
    classes = [getattr(source, "classes", None) for source in (train, valid)]
    if classes[0] != classes[1]:
        raise UserError(
            f"datasets {train.name!r} and {valid.name!r} have different classes: "
            f"{_shown(classes[0])} and {_shown(classes[1])}",
            key="eval.linear_probe",
        )
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


def fit_lbfgs(
    feature_ND: Tensor,
    label_N: Tensor,
    num_classes: int,
    regularisation: float,
    *,
    start: Linear | None = None,
) -> Linear:
    """Minimise Σ cross-entropy + ``regularisation``/2·‖W‖² over weight and bias, in fp64.

    The bias is not regularised. Memory beyond the features is O(chunk × classes).
    """
    width = feature_ND.shape[1]
    weights = torch.zeros(width + 1, num_classes, dtype=torch.float64, device=feature_ND.device)
    if start is not None:
        weights[:-1], weights[-1] = start.weight, start.bias
    weights.requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weights],
        max_iter=_MAX_ITERATIONS,
        history_size=10,
        tolerance_grad=1e-7,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )
    count = len(label_N)

    def closure() -> Tensor:
        # Divided by the number of images, so that tolerances mean the same at any size.
        with torch.no_grad():
            gradient = torch.zeros_like(weights)
            loss = regularisation / (2 * count) * weights[:-1].square().sum()
            gradient[:-1] = regularisation / count * weights[:-1]
            for x, y in zip(feature_ND.split(_CHUNK), label_N.split(_CHUNK), strict=True):
                x = F.pad(x.double(), (0, 1), value=1.0)
                log_p = (x @ weights).log_softmax(1)
                loss = loss - log_p.gather(1, y[:, None]).sum() / count
                gradient += x.T @ (log_p.exp() - F.one_hot(y, num_classes)) / count
            weights.grad = gradient
        return loss

    optimizer.step(closure)
    weights = weights.detach()
    return Linear(weights[:-1], weights[-1])


def choose_regularisation(
    feature_ND: Tensor,
    label_N: Tensor,
    num_classes: int,
    candidates: Sequence[float],
    *,
    seed: int = 0,
) -> float:
    """The candidate with the best accuracy on held-out images; the strongest of equals.

    Fits run from strong to weak, each starting where the last ended.
    """
    ordered = sorted(candidates, reverse=True)
    held = held_out(label_N, seed)
    if len(ordered) == 1 or not held.any():
        return ordered[0]
    best, best_right, linear = ordered[0], -1, None
    for candidate in ordered:
        linear = fit_lbfgs(feature_ND[~held], label_N[~held], num_classes, candidate, start=linear)
        ranks = metrics.label_ranks(linear(feature_ND[held]), label_N[held])
        right = int((ranks <= 1).sum())
        if right > best_right:
            best, best_right = candidate, right
    return best


def held_out(label_N: Tensor, seed: int) -> Tensor:
    """bool [N], true for a tenth of each class's images, at random; a class of one keeps it."""
    generator = np.random.default_rng(seed)
    labels = label_N.cpu().numpy()
    held = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        rows = generator.permutation(np.flatnonzero(labels == label))
        held[rows[: min(-(-len(rows) // _HELD_OUT), len(rows) - 1)]] = True
    return torch.from_numpy(held).to(label_N.device)


def fit_steps(
    feature_ND: Tensor,
    label_N: Tensor,
    num_classes: int,
    config: schema.LinearProbe,
    *,
    optimizer: OptimizerFactory | None = None,
    seed: int = 0,
) -> Linear:
    """Train by steps in fp32 with a cosine schedule; by momentum SGD where no other is given."""
    if optimizer is None and config.method == "lars":
        raise ValueError("method lars needs the optimizer passed in")
    mean_D = feature_ND.mean(0)
    scale_D = feature_ND.var(0, correction=0).add(1e-6).rsqrt()
    head = nn.Linear(feature_ND.shape[1], num_classes, device=feature_ND.device)
    nn.init.zeros_(head.weight)  # a linear model needs no symmetry broken
    nn.init.zeros_(head.bias)
    made = (optimizer or _sgd)(head.parameters(), config.lr)
    size = min(config.batch_size, len(label_N))
    steps_per_epoch = math.ceil(len(label_N) / size)
    total = config.epochs * steps_per_epoch
    for epoch in range(config.epochs):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(len(label_N), generator=generator).to(label_N.device)
        for step, rows in enumerate(order.split(size)):
            done = (epoch * steps_per_epoch + step) / total
            for group in made.param_groups:
                group["lr"] = config.lr * 0.5 * (1 + math.cos(math.pi * done))
            x = (feature_ND[rows] - mean_D) * scale_D
            made.zero_grad()
            with torch.enable_grad():
                F.cross_entropy(head(x), label_N[rows]).backward()
            made.step()
    weight_DK = (head.weight.detach() * scale_D).T
    return Linear(weight_DK, head.bias.detach() - mean_D @ weight_DK)


def _sgd(parameters: Iterable[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr, momentum=_MOMENTUM)


def _check(source: Source, images: Encoded) -> None:
    if not len(images.rows) or (images.labels < 0).any():
        what = "images without a label" if len(images.rows) else "no image that can be used"
        raise UserError(
            f"dataset {source.name!r} ({source.split}) has {what}; a linear probe needs labelled "
            "images (format: imagefolder)",
            key="eval.linear_probe",
        )
    bad = (~images.features.isfinite()).any(1).nonzero().flatten().tolist()
    if bad:
        raise FaultError(
            f"linear probe on {source.name!r}: {len(bad)} image features are NaN or infinite, the "
            f"first of row {int(images.rows[bad[0]])}"
        )


def _shown(classes: list[str] | None) -> str:
    if classes is None:
        return "none"
    return f"{len(classes)} ({', '.join(classes[:3])}{', …' if len(classes) > 3 else ''})"
