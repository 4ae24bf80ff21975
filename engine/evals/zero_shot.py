"""Zero-shot classification: images against texts made of class names and prompt templates.

A class's feature is the L2-normed mean of the L2-normed features of its prompts (Radford et al.
2021, arXiv:2103.00020, section 3.1.4).
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.errors import FaultError
from engine.evals.classes import NamedLabels, Prompts, check_labels, load
from engine.evals.evaluation import Evaluation, Result
from engine.evals.predict import Predictor, share
from engine.metrics import classification as metrics
from engine.types import Source

MODALITIES = ("text",)

_CHUNK = 4096  # images scored at once


class ZeroShotEvaluation(Evaluation):
    """Of the sets of labelled images in ``eval.zero_shot``."""

    best = "accuracy@1"
    order = 1

    def datasets(self) -> list[str]:
        """The sets' names."""
        return list(self.config.eval.zero_shot)

    def check(self) -> None:
        """Also that the classes are those of the dataset."""
        for name in self.datasets():
            self._classes(name)

    def evaluate(self, dataset: str, model: Predictor) -> Result:
        """Accuracies."""
        return evaluate(model, *self._classes(dataset), num_rows=self.num_rows)

    def _classes(self, name: str) -> tuple[Source, Prompts]:
        """Labelled images, and the prompts of their classes. Raises UserError."""
        chosen, key = self.config.eval.zero_shot[name], f"eval.zero_shot.{name}"
        source = self.open(chosen.dataset, key=f"{key}.dataset")
        texts = load(chosen.classes, chosen.templates, dataset=chosen.dataset, key=key)
        texts.in_order_of(source.classes, source.name)
        return source, texts


build = ZeroShotEvaluation


def evaluate(
    model: Predictor, source: Source, prompts: Prompts, *, num_rows: int | None = None
) -> Result:
    """Accuracy at 1 and 5 and mean per class, in percent, of ``num_rows`` images (default: all).

    Those are spread evenly over the rows, which are mostly sorted by class. Rows that name their
    class are labelled by the prompts' names. Images that cannot be read are left out and named in
    ``bad``. Raises UserError where classes and the source's labels do not fit, FaultError for
    features that are NaN.
    """
    prompts = prompts.in_order_of(source.classes, source.name)
    if source.classes is None:
        source = NamedLabels(source, prompts.numbers(), prompts.origin)
    seen = len(source) if num_rows is None else min(num_rows, len(source))
    class_KD = class_features(model, prompts)
    images = model.images(source, np.arange(seen) * len(source) // max(seen, 1))
    check_labels(source, images, len(prompts.classes))
    ranks = []
    try:
        chunks = images.features.split(_CHUNK), images.labels.split(_CHUNK)
        for feature_BD, label_B in zip(*chunks, strict=True):
            score_BK = feature_BD.double() @ class_KD.double().T
            ranks.append(metrics.label_ranks(score_BK.float(), label_B.to(score_BK.device)).cpu())
    except ValueError as error:
        raise FaultError(f"evaluation on {source.name!r}: {error}") from error
    return Result({**metrics.from_ranks(torch.cat(ranks), images.labels)}, images.bad)


def class_features(model: Predictor, prompts: Prompts) -> Tensor:
    """[classes, D], L2-normed. Each rank encodes its share of the classes."""
    labels = range(len(prompts.classes))
    prompt_ND = model.texts([text for label in share(labels) for text in prompts.texts(label)])
    parts = F.normalize(prompt_ND, dim=-1).split([len(prompts.texts(label)) for label in labels])
    return F.normalize(torch.stack([part.mean(0) for part in parts]), dim=-1)
