"""Image–text retrieval of a dataset: images once, all captions, any-hit recall both ways.

Rows of one ``image_id`` are one image with several captions. Rows without a caption and images that
cannot be read are left out and named.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.data.bad_samples import BadRecord, summary
from engine.errors import FaultError, UserError
from engine.evals.evaluation import Evaluation, Result
from engine.evals.predict import Encoded, Predictor, gather_bad, gather_numbers, share
from engine.logs.gallery import Example
from engine.metrics import retrieval as metrics
from engine.types import BadSample, Source

MODALITIES = ("text",)

_NUM_EXAMPLES = 8  # images of the gallery


class RetrievalEvaluation(Evaluation):
    """Of the validation sets."""

    best = "RSUM"

    def score(self, model: Predictor, source: Source) -> Result:
        """Recalls both ways, their confidence intervals where ``eval.bootstrap`` asks, and the
        same of captions with their words in another order where ``eval.shuffle_words`` does: a
        model that scores as high on those does not read the order.

        Raises UserError where nothing is left to rank, FaultError for features that are NaN.
        """
        section, seed = self.config.eval, self.config.runner.seed
        gallery = _gallery(model, source, self.num_rows)
        caption_CD = model.texts(list(gallery.captions.values()))
        ranks = _ranks(source, gallery, caption_CD)
        figures: dict[str, float | str] = {**metrics.from_ranks(*ranks)}
        if section.shuffle_words:
            mixed = [_shuffled(caption, seed, row) for row, caption in gallery.captions.items()]
            values = metrics.from_ranks(*_ranks(source, gallery, model.texts(mixed)))
            figures |= {f"shuffled_words/{name}": value for name, value in values.items()}
        if section.bootstrap:
            intervals = metrics.bootstrap(
                *ranks, gallery.caption_image, num_draws=section.bootstrap, seed=seed
            )
            for name, (low, high) in intervals.items():
                figures |= {f"{name}_low": low, f"{name}_high": high}
        rows_N = gallery.images.rows[:_NUM_EXAMPLES].tolist()
        best = metrics.top_captions(gallery.images.features[:_NUM_EXAMPLES], caption_CD)
        examples = [
            self._example(source, row, gallery.caption_rows[top].tolist(), scores)
            for row, scores, top in zip(rows_N, best[0].tolist(), best[1].numpy(), strict=True)
        ]
        return Result(figures, gallery.bad, examples=examples)

    def _example(
        self, source: Source, row: int, captions: list[int], cosines: list[float]
    ) -> Example:
        """An image with its own caption, and the rows of those found for it, best first."""
        own, found = source[row], [source[other].caption for other in captions]
        pairs = list(zip(found, cosines, strict=True))
        return Example(self.thumbnail(source, row), [own.caption], pairs, own.image_id)


build = RetrievalEvaluation


@dataclass
class _Gallery:
    """Encoded images and the captions that belong to them."""

    images: Encoded
    captions: dict[int, str]  # this rank's share, by row, in order
    caption_rows: np.ndarray  # of all ranks' captions
    caption_image: Tensor  # [C], image of each
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
        bad,
    )


def _captions(source: Source, num_rows: int) -> tuple[dict[int, str], list[BadRecord]]:
    """This rank's share of the captions by row, and all ranks' rows that cannot be used."""
    captions: dict[int, str] = {}
    bad: list[BadRecord] = []
    for row in share(range(num_rows)):
        try:
            captions[row] = source[row].caption
        except BadSample as error:
            bad.append(BadRecord(None, source.name, row, f"row {row}", error.cause, error.detail))
    return captions, gather_bad(bad)


def _ranks(source: Source, gallery: _Gallery, caption_CD: Tensor) -> tuple[Tensor, Tensor]:
    """(image→text, text→image) ranks of all queries, each rank having ranked its share of them."""
    image_ID = gallery.images.features
    features = image_ID, caption_CD, gallery.caption_image
    try:  # every rank holds all features, so all of them get to an error
        mine = (
            metrics.image_to_text_ranks(*features, share(range(len(image_ID)))),
            metrics.text_to_image_ranks(*features, share(range(len(caption_CD)))),
        )
    except ValueError as error:
        raise FaultError(f"evaluation on {source.name!r}: {error}") from error
    return gather_numbers(mine[0], image_ID.device), gather_numbers(mine[1], image_ID.device)


def _shuffled(caption: str, seed: int, row: int) -> str:
    words = caption.split()
    return " ".join(words[i] for i in np.random.default_rng([seed, row]).permutation(len(words)))
