"""Linear probe: multinomial logistic regression on frozen features, computed once.

``lbfgs`` minimises Σ cross-entropy + λ/2·‖W‖² in fp64, with λ chosen by accuracy on a held-out
tenth of the training images, then fitted again on all (Radford et al. 2021, arXiv:2103.00020,
appendix A.3; λ is 1/C of scikit-learn). ``sgd`` trains by steps with a cosine schedule, on features
standardised by the training set's mean and variance (He et al. 2022, arXiv:2111.06377, appendix A).

Shapes: ``feature_ND`` [images, width], ``label_N`` int64; K classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.config import schema
from engine.errors import FaultError, UserError
from engine.evals.classes import NamedLabels, check_labels, class_names
from engine.evals.evaluation import Evaluation, Result
from engine.evals.predict import Predictor
from engine.metrics import classification as metrics
from engine.types import Source

_HELD_OUT = 10  # one of so many training images of a class chooses λ
_CHUNK = 8192  # rows turned into fp64 at once
_MAX_ITERATIONS = 1000
_MOMENTUM = 0.9


class LinearProbeEvaluation(Evaluation):
    """Of ``eval.linear_probe``; its figures stand under the training set's name and ``_probe``."""

    best = "accuracy@1"
    order = 2

    def datasets(self) -> list[str]:
        """One name, or none."""
        train = self.config.eval.linear_probe.train
        return [f"{train}_probe"] if train else []

    def check(self) -> None:
        """Open both sets."""
        self._labelled()

    def evaluate(self, dataset: str, model: Predictor) -> Result:
        """Accuracies."""
        probe, seed = self.config.eval.linear_probe, self.config.runner.seed
        return evaluate(model, *self._labelled(), probe, seed=seed)

    def _labelled(self) -> tuple[Source, Source]:
        """Labelled images to fit on, and those to score. Raises UserError."""
        probe = self.config.eval.linear_probe
        train, valid = probe.train or "", probe.valid or probe.train or ""
        return (
            self.open(train, "train", key="eval.linear_probe.train"),
            self.open(valid, key="eval.linear_probe.valid"),
        )


build = LinearProbeEvaluation


def evaluate(
    model: Predictor, train: Source, valid: Source, config: schema.LinearProbe, *, seed: int = 0
) -> Result:
    """Accuracies of the probe on ``valid``, in percent; every rank fits the same classifier.

    Raises UserError for images without labels and for different classes, FaultError for features
    that are not finite.
    """
    if train.classes != valid.classes:
        raise UserError(
            f"datasets {train.name!r} and {valid.name!r} have different classes: "
            f"{_shown(train.classes)} and {_shown(valid.classes)}",
            key="eval.linear_probe",
        )
    if train.classes is None:
        numbers = {name: number for number, name in enumerate(class_names(train, valid))}
        train, valid = (NamedLabels(source, numbers, train.name) for source in (train, valid))
    sets = [model.images(source, np.arange(len(source))) for source in (train, valid)]
    for source, images in zip((train, valid), sets, strict=True):
        check_labels(source, images, key="eval.linear_probe")
        bad = (~images.features.isfinite()).any(1).nonzero().flatten().tolist()
        if bad:
            raise FaultError(
                f"linear probe on {source.name!r}: {len(bad)} image features are NaN or infinite, "
                f"the first of row {int(images.rows[bad[0]])}"
            )
    x, xv = (images.features for images in sets)
    y, yv = (images.labels.to(model.device) for images in sets)
    num_classes = int(max(y.max(), yv.max())) + 1
    if config.method == "lbfgs":
        chosen = choose_regularisation(x, y, num_classes, config.regularisation, seed=seed)
        linear = fit_lbfgs(x, y, num_classes, chosen)
    else:
        linear = fit_steps(x, y, num_classes, config, seed=seed)
    values = metrics.from_ranks(metrics.label_ranks(linear(xv), yv).cpu(), yv.cpu())
    return Result({**values}, sets[0].bad + sets[1].bad)


def _shown(classes: Sequence[str] | None) -> str:
    if classes is None:
        return "none"
    return f"{len(classes)} ({', '.join(classes[:3])}{', …' if len(classes) > 3 else ''})"


# --- classifiers on fixed features


@dataclass(frozen=True)
class Linear:
    """A linear classifier: scores = features · weight + bias."""

    weight: Tensor  # [D, K]
    bias: Tensor  # [K]

    def __call__(self, feature_ND: Tensor) -> Tensor:
        chunks = feature_ND.split(_CHUNK)
        return torch.cat([x.to(self.weight) @ self.weight + self.bias for x in chunks])


def fit_lbfgs(
    feature_ND: Tensor,
    label_N: Tensor,
    num_classes: int,
    regularisation: float,
    *,
    start: Linear | None = None,
    tolerance: float = 1e-4,
) -> Linear:
    """Minimise Σ cross-entropy + ``regularisation``/2·‖W‖² over weight and bias, in fp64.

    The bias is not regularised. The search runs in variables in which the curvature at W = 0 is
    round: tens of iterations instead of thousands where features nearly agree. It ends where no
    entry of the gradient exceeds ``tolerance``. Memory is O(chunk × classes + D²).
    """
    mean_D = feature_ND.double().mean(0)
    root_DD, inverse_DD = _rounding(feature_ND, mean_D, num_classes, regularisation)
    # The last row is the bias of centred features: the bias being free, centring changes no score.
    search = mean_D.new_zeros(len(mean_D) + 1, num_classes)
    if start is not None:
        search[:-1] = inverse_DD @ start.weight
        search[-1] = start.bias + mean_D @ start.weight
    search.requires_grad_()
    optimizer = torch.optim.LBFGS(
        [search],
        max_iter=_MAX_ITERATIONS,
        tolerance_grad=tolerance,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    @torch.no_grad()
    def closure() -> Tensor:
        weight_DK = root_DD @ search[:-1]
        loss = regularisation / 2 * weight_DK.square().sum()
        slope_DK = regularisation * weight_DK
        bias_slope_K = torch.zeros_like(search[-1])
        for x, y in zip(feature_ND.split(_CHUNK), label_N.split(_CHUNK), strict=True):
            x = x.double() - mean_D
            log_p = (x @ weight_DK + search[-1]).log_softmax(1)
            loss = loss - log_p.gather(1, y[:, None]).sum()
            error = log_p.exp() - F.one_hot(y, num_classes)
            slope_DK += x.T @ error
            bias_slope_K += error.sum(0)
        search.grad = torch.cat([root_DD @ slope_DK, bias_slope_K[None]]) / len(label_N)
        return loss / len(label_N)

    optimizer.step(closure)
    weight_DK = root_DD @ search.detach()[:-1]
    return Linear(weight_DK, search.detach()[-1] - mean_D @ weight_DK)


def _rounding(
    feature_ND: Tensor, mean_D: Tensor, num_classes: int, regularisation: float
) -> tuple[Tensor, Tensor]:
    """H^(-1/2) and H^(1/2) for the curvature H = (XᵀX/K + λI)/N of the mean loss at W = 0."""
    square_DD = torch.diag(torch.zeros_like(mean_D))
    for x in feature_ND.split(_CHUNK):
        x = x.double() - mean_D
        square_DD += x.T @ x
    values_D, vectors_DD = torch.linalg.eigh(square_DD)
    values_D = (values_D.clamp(min=0) / num_classes + regularisation) / len(feature_ND)
    return (
        vectors_DD * values_D.rsqrt() @ vectors_DD.T,
        vectors_DD * values_D.sqrt() @ vectors_DD.T,
    )


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
    seed: int = 0,
) -> Linear:
    """Train by steps in fp32 with a cosine schedule; by momentum SGD or LARS."""
    mean_D = feature_ND.mean(0)
    scale_D = feature_ND.var(0, correction=0).add(1e-6).rsqrt()
    head = nn.Linear(feature_ND.shape[1], num_classes, device=feature_ND.device)
    nn.init.zeros_(head.weight)  # a linear model needs no symmetry broken
    nn.init.zeros_(head.bias)
    made: torch.optim.Optimizer
    if config.method == "lars":
        from engine.train.lars import LARS  # with timm, which takes a while to import

        made = LARS(head.parameters(), config.lr)
    else:
        made = torch.optim.SGD(head.parameters(), config.lr, momentum=_MOMENTUM)
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
