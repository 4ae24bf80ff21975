"""What was recognised in each image: as lines, as figures, as a curve, to look at."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from engine.data.text.nouns import lemmatiser
from engine.evals.gallery import thumbnail
from engine.evals.sentences import Embed
from engine.generate.labels import Label
from engine.logs.charts import precision_recall
from engine.logs.gallery import Example
from engine.metrics import recognition as metrics
from engine.types import BadSample, Source

Vectors = Callable[[Sequence[str]], np.ndarray]


@dataclass(frozen=True, slots=True)
class Recognised:
    """An image's labels, the best first, and its own."""

    image_id: str
    row: int  # of the source
    labels: list[Label]
    references: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """A line of a predictions file."""
        told: dict[str, Any] = {
            "image_id": self.image_id,
            "labels": [label.to_json() for label in self.labels],
        }
        if self.references:
            told["references"] = self.references
        return told


def score(
    predictions: Sequence[Recognised], ks: Sequence[int], embed: Embed | None = None
) -> dict[str, float]:
    """Precision, recall and F1 at each k, in percent: word for word, by lemma where there is a
    lemmatiser, and by meaning where there is an encoder (``embed``). Beside them, F1 of naming
    the k labels that these images have most often, whatever an image shows (``commonest_…``)."""
    own = [p.references for p in predictions]
    said = [[label.text for label in p.labels][: max(ks)] for p in predictions]
    often = Counter(label for labels in own for label in labels).most_common(max(ks))
    vectors = _vectors([*said, *own], embed) if embed else None
    names = {"P": "precision", "R": "recall", "F1": "f1"}
    found = {
        f"{kind}_{name}@{k}": 100 * getattr(scores, part)
        for kind, by_k in _scores(said, own, ks, vectors).items()
        for k, scores in by_k.items()
        for name, part in names.items()
    }
    blind = _scores([[label for label, _ in often]] * len(own), own, ks, vectors)
    for kind, by_k in blind.items():
        found |= {f"commonest_{kind}_F1@{k}": 100 * scores.f1 for k, scores in by_k.items()}
    return found


def _scores(
    said: Sequence[Sequence[str]],
    own: Sequence[Sequence[str]],
    ks: Sequence[int],
    vectors: Vectors | None,
) -> dict[str, dict[int, metrics.Scores]]:
    """Scores by the kind of agreement and k."""
    kinds = {"exact": {k: metrics.exact(said, own, k) for k in ks}}
    if (lemma := lemmatiser()) is not None:
        kinds["lemma"] = {k: metrics.exact(said, own, k, lambda s: lemma(s.lower())) for k in ks}
    if vectors is not None:  # cosines [true, predicted] of each image's labels
        pairs = zip(own, said, strict=True)
        likeness = [vectors(true) @ vectors(given).T for true, given in pairs]
        kinds["semantic"] = {k: metrics.semantic(likeness, k) for k in ks}
    return kinds


def _vectors(label_lists: Sequence[Sequence[str]], embed: Embed) -> Vectors:
    """Vectors [N, D] of any of these labels; every text is encoded once."""
    texts = sorted({label for labels in label_lists for label in labels})
    vector_ND, at = embed(texts), {text: place for place, text in enumerate(texts)}
    return lambda labels: vector_ND[[at[label] for label in labels]]


def curve(name: str, predictions: Sequence[Recognised]) -> Image.Image | None:
    """The precision-recall curve of all labels; None where none was given."""
    told = [[(label.text, label.prob) for label in p.labels] for p in predictions]
    found = metrics.curve(told, [p.references for p in predictions])
    if not found.precision.size:
        return None
    points = (found.recall.tolist(), found.precision.tolist())
    return precision_recall(f"Labels of {name}, word for word", {"by probability": points})


def shown(source: Source, one: Recognised, max_pixels: int) -> Example:
    """An image with its own labels and those that it was given, with their probabilities."""
    try:
        images = source[one.row].images
    except BadSample:
        images = ()
    given: list[tuple[str, float | None]] = [(label.text, label.prob) for label in one.labels]
    return Example(thumbnail(images, max_pixels), one.references, given, one.image_id)
