"""Image–text retrieval of a dataset: images once, all captions, any-hit recall both ways."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from engine.data.bad_samples import BadRecord, summary
from engine.data.share import rank_slice
from engine.dist import collectives
from engine.errors import FaultError, UserError
from engine.evals.evaluation import Evaluation, Result
from engine.evals.predict import Encoded, Predictor, gather_numbers
from engine.logs.gallery import Example
from engine.metrics import retrieval as metrics
from engine.run import Run
from engine.types import BadSample, Source

MODALITIES = ("text",)
SHUFFLED = "shuffled_words/"

_NUM_EXAMPLES = 8  # images of the gallery


@dataclass
class Retrieval:
    """What an evaluation found; equal on every rank."""

    metrics: dict[str, float]
    num_images: int
    num_captions: int
    num_seen: int  # rows read, bad ones included
    bad: list[BadRecord]
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    examples: list[tuple[int, list[tuple[int, float]]]] = field(default_factory=list)
    """(row of an image, [(row of a caption, cosine), …] best first), for a gallery."""


def evaluate(
    model: Predictor,
    source: Source,
    *,
    num_rows: int | None = None,
    shuffle_words: bool = False,
    seed: int = 0,
    bootstrap_draws: int = 0,
    num_examples: int = 0,
) -> Retrieval:
    """Retrieval figures of the first ``num_rows`` rows of ``source`` (all by default).

    Rows of one ``image_id`` are one image with several captions. Rows without a caption and images
    that cannot be read are left out and named in ``bad``. ``shuffle_words`` also scores captions
    with their words in another order (names begin with ``shuffled_words/``): a model that scores
    as high on those does not read the order. Raises UserError where nothing is left to rank,
    FaultError for features that are NaN or infinite.
    """
    gallery = _gallery(model, source, num_rows)
    image_ID, caption_image_C = gallery.images.features, gallery.caption_image
    caption_CD = model.texts(list(gallery.captions.values()))
    ranks = _ranks(source, image_ID, caption_CD, caption_image_C)
    found = Retrieval(
        metrics=metrics.from_ranks(*ranks),
        num_images=len(image_ID),
        num_captions=len(caption_CD),
        num_seen=gallery.num_seen,
        bad=gallery.bad,
    )
    if shuffle_words:
        mixed = [_shuffled(caption, seed, row) for row, caption in gallery.captions.items()]
        mixed_ranks = _ranks(source, image_ID, model.texts(mixed), caption_image_C)
        values = metrics.from_ranks(*mixed_ranks)
        found.metrics |= {SHUFFLED + name: value for name, value in values.items()}
    if bootstrap_draws:
        found.intervals = metrics.bootstrap(
            *ranks, caption_image_C, num_draws=bootstrap_draws, seed=seed
        )
    if num_examples:
        found.examples = _examples(gallery, caption_CD, num_examples)
    return found


@dataclass
class _Gallery:
    """Encoded images and the captions that belong to them."""

    images: Encoded
    captions: dict[int, str]  # this rank's share, by row, in order
    caption_rows: np.ndarray  # of all ranks' captions
    caption_image: Tensor  # [C], image of each
    num_seen: int
    bad: list[BadRecord]


def _gallery(model: Predictor, source: Source, num_rows: int | None) -> _Gallery:
    seen = len(source) if num_rows is None else min(num_rows, len(source))
    captions, bad = _captions(source, seen)
    good = np.setdiff1d(np.arange(seen), [record.index for record in bad])
    codes = np.asarray(source.column("image_id"))[good]
    _, first, owner = np.unique(codes, return_index=True, return_inverse=True)
    by_appearance = np.argsort(first)
    image_rows = good[first[by_appearance]]
    owner = np.argsort(by_appearance)[owner]  # image of each good row, in order of appearance

    images = model.images(source, image_rows)
    place = np.full(len(image_rows), -1)  # of an image among those that could be read
    place[np.searchsorted(image_rows, images.rows)] = np.arange(len(images.rows))
    kept = place[owner] >= 0
    bad = bad + images.bad
    if not kept.any():
        raise UserError(
            f"dataset {source.name!r} ({source.split}) has no image with a caption that can be "
            f"used: {summary(bad) if bad else 'it has no rows'}"
        )
    rows = set(good[kept].tolist())
    return _Gallery(
        images,
        {row: caption for row, caption in captions.items() if row in rows},
        good[kept],
        torch.from_numpy(place[owner[kept]]).to(model.device),
        seen,
        bad,
    )


def _captions(source: Source, num_rows: int) -> tuple[dict[int, str], list[BadRecord]]:
    """This rank's share of the captions by row, and all ranks' rows that cannot be used."""
    captions: dict[int, str] = {}
    bad: list[dict] = []
    for row in rank_slice(range(num_rows), collectives.rank(), collectives.world()):
        try:
            captions[row] = source[row].caption
        except BadSample as error:
            record = BadRecord(None, source.name, row, f"row {row}", error.cause, error.detail)
            bad.append(record.to_json())
    gathered = collectives.all_gather_json(bad)
    return captions, [BadRecord(**record) for records in gathered for record in records]


def _ranks(
    source: Source, image_ID: Tensor, caption_CD: Tensor, caption_image_C: Tensor
) -> tuple[Tensor, Tensor]:
    """(image→text, text→image) ranks of all queries, each rank having ranked its share of them."""
    features = (image_ID, caption_CD, caption_image_C)
    found = []
    try:
        for queries, count in (
            (metrics.image_to_text_ranks, len(image_ID)),
            (metrics.text_to_image_ranks, len(caption_CD)),
        ):
            share = rank_slice(range(count), collectives.rank(), collectives.world())
            mine_N = queries(*features, start=share.start, stop=share.stop)
            found.append(gather_numbers(mine_N, image_ID.device))
    except ValueError as error:  # every rank holds all features, so all of them get here
        raise FaultError(f"evaluation on {source.name!r}: {error}") from error
    return found[0], found[1]


def _examples(
    gallery: _Gallery, caption_CD: Tensor, num_examples: int
) -> list[tuple[int, list[tuple[int, float]]]]:
    rows_N = gallery.images.rows[:num_examples].tolist()
    score_NK, top_NK = metrics.top_captions(gallery.images.features[:num_examples], caption_CD)
    return [
        (row, list(zip(gallery.caption_rows[top].tolist(), score.tolist(), strict=True)))
        for row, top, score in zip(rows_N, top_NK.numpy(), score_NK, strict=True)
    ]


def _shuffled(caption: str, seed: int, row: int) -> str:
    words = caption.split()
    return " ".join(words[i] for i in np.random.default_rng([seed, row]).permutation(len(words)))


class RetrievalEvaluation(Evaluation):
    """Of the validation sets."""

    best = "RSUM"

    def evaluate(self, dataset: str, model: Predictor) -> Result:
        """Recalls both ways, with their confidence intervals where ``eval.bootstrap`` asks."""
        source, section = self.open(dataset), self.config.eval
        found = evaluate(
            model,
            source,
            num_rows=self.num_rows,
            shuffle_words=section.shuffle_words,
            seed=self.config.runner.seed,
            bootstrap_draws=section.bootstrap or 0,
            num_examples=_NUM_EXAMPLES,
        )
        figures: dict[str, float | str] = {**found.metrics}
        for name, (low, high) in found.intervals.items():
            figures |= {f"{name}_low": low, f"{name}_high": high}
        examples = [self._example(source, *example) for example in found.examples]
        return Result(figures, found.bad, examples=examples)

    def _example(self, source: Source, row: int, captions: list[tuple[int, float]]) -> Example:
        """An image with its own caption, and those found for it: (row, cosine), best first."""
        own = source[row]
        found = [(source[other].caption, cosine) for other, cosine in captions]
        return Example(self.thumbnail(source, row), [own.caption], found, own.image_id)


def build(run: Run) -> RetrievalEvaluation:
    """Recalls of images and captions by each other."""
    return RetrievalEvaluation(run)
