"""Captions of a validation set: one for each image, scored against all its references."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from engine.config.schema import Generate
from engine.data.bad_samples import BadRecord, summary
from engine.data.loader import valid_batches
from engine.dist import collectives
from engine.errors import FaultError
from engine.evals.encode import Encoder, evaluating
from engine.evals.predictions import Prediction, exact_match
from engine.generate.texts import generate_texts
from engine.metrics.captions import JavaError, caption_scores
from engine.metrics.clipscore import clip_scores
from engine.types import Source

CIRCULAR = "the ranker: circular"


class Judge(Protocol):
    """A contrastive model that says how well texts fit a source's images."""

    name: str

    @property
    def digest(self) -> str: ...

    def cosines(
        self, source: Source, rows: Sequence[int], texts: Sequence[Sequence[str]]
    ) -> list[list[float]]: ...

    def features(
        self, source: Source, rows: Sequence[int], texts: Sequence[str]
    ) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True, slots=True)
class Captions:
    """What an evaluation found: figures, predictions in the order of rows, bad samples.

    Beside the figures stand, in words, what tokenized the captions and whose CLIPScore it is.
    """

    metrics: dict[str, float | str]
    predictions: list[Prediction]
    bad: list[BadRecord]


def evaluate(
    encoder: Encoder,
    source: Source,
    section: Generate,
    *,
    instruction: str,
    num_images: int | None = None,
    ranker: Judge | None = None,
    scorer: Judge | None = None,
) -> Captions:
    """Generate and score; every rank takes part and gets the same figures."""
    codes = np.asarray(source.column("image_id"))
    _, first = np.unique(codes, return_index=True)
    rows = np.sort(first)[:num_images]
    predictions, bad = speak(encoder, source, rows, section, instruction, ranker)
    if not predictions:
        raise FaultError(f"{source.name}: none of the {len(rows)} images is usable: {summary(bad)}")
    references = _references(source, codes, rows)
    for prediction in predictions:
        prediction.references.extend(references[int(codes[prediction.row])])
    predictions = [prediction for prediction in predictions if prediction.references]
    if not predictions:
        raise FaultError(f"{source.name}: none of the {len(rows)} images has a caption")
    metrics = {**score(predictions), "exact_match": exact_match(predictions)}
    metrics |= _content_scores(source, predictions)
    if scorer is not None:
        metrics |= _clip_scores(scorer, source, predictions)
        if ranker is not None and section.method == "best_of_n":
            metrics["scorer"] = CIRCULAR if same_model(ranker, scorer) else "not the ranker"
    metrics["tokenizer"] = "PTB by Java"
    return Captions(metrics, predictions, bad)


def _content_scores(source: Source, predictions: Sequence[Prediction]) -> dict[str, float]:
    """Figures that the dataset itself has, beside the usual ones; most have none."""
    while source.below:
        source = source.below[0]
    if source.content_scores is None:
        return {}
    said = [prediction.caption for prediction in predictions]
    return source.content_scores(said, [prediction.references[0] for prediction in predictions])


def same_model(ranker: Judge, scorer: Judge) -> bool:
    """Whether two judges are one model, however each was named."""
    return ranker is scorer or ranker.digest == scorer.digest


def speak(
    encoder: Encoder,
    source: Source,
    rows: np.ndarray,
    section: Generate,
    instruction: str,
    ranker: Judge | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> tuple[list[Prediction], list[BadRecord]]:
    """A caption for each of the rows' images, on every rank alike, and what could not be read.

    Of several texts the one that the ranker likes best is taken, of equal ones the first.
    ``stopped`` is asked after each batch of a rank: no more follow.
    """
    said, bad = _generate(encoder, source, rows, section, instruction, stopped)
    if not said:
        return [], bad
    done = sorted(said)
    cosines: list[list[float]] = [[] for _ in done]
    if ranker is not None and section.method == "best_of_n":
        cosines = ranker.cosines(source, done, [said[row] for row in done])
    predictions = []
    for row, liked in zip(done, cosines, strict=True):
        best = max(range(len(liked)), key=liked.__getitem__) if liked else 0
        several = said[row] if len(said[row]) > 1 else []
        predictions.append(
            Prediction(source[row].image_id, row, said[row][best], [], several, liked)
        )
    return predictions, bad


def _generate(
    encoder: Encoder,
    source: Source,
    rows: np.ndarray,
    section: Generate,
    instruction: str,
    stopped: Callable[[], bool],
) -> tuple[dict[int, list[str]], list[BadRecord]]:
    """Row → its texts, of all ranks; and what could not be read."""
    task: Any = encoder.task
    model: Any = encoder.model
    said: dict[int, list[str]] = {}
    bad: list[BadRecord] = []
    batches = valid_batches(
        source,
        rows,
        encoder.transform,
        task.batch,
        batch_size=section.batch_size,
        rank=collectives.rank(),
        world=collectives.world(),
        num_workers=encoder.num_workers,
        limits=encoder.limits,
    )
    devices = [encoder.device] if encoder.device.type == "cuda" else []
    with evaluating(encoder.model), torch.random.fork_rng(devices):  # training goes on undisturbed
        for _, batch, bad_here in batches:
            bad += bad_here
            if not batch:
                continue
            image_BCHW, here = batch["image_BCHW"].to(encoder.device), batch["index_B"].tolist()
            with encoder.autocast():
                texts = generate_texts(
                    task, model, image_BCHW, [instruction] * len(here), section, rows=here
                )
            said |= dict(zip(here, texts, strict=True))
            if stopped():
                break
    gathered = collectives.all_gather_json([list(said.items()), [b.to_json() for b in bad]])
    every = {row: texts for part, _ in gathered for row, texts in part}
    return every, [BadRecord(**record) for _, records in gathered for record in records]


def _references(source: Source, codes: np.ndarray, rows: np.ndarray) -> dict[int, list[str]]:
    """All captions of the wanted images, by the image's code."""
    wanted = set(codes[rows].tolist())
    found: dict[int, list[str]] = defaultdict(list)
    for code, caption in zip(codes.tolist(), source.captions(), strict=True):
        if code in wanted and caption:
            found[code].append(caption)
    return found


def score(predictions: list[Prediction]) -> dict[str, float | str]:
    """Caption metrics but SPICE, which takes a download; the same on every rank.

    Rank 0 scores for all, so that a machine starts Java once. METEOR, where it fails, says why.
    """
    figures, failure = collectives.broadcast_json(
        _scored(predictions) if collectives.rank() == 0 else None
    )
    if failure:
        raise FaultError(f"the captions cannot be scored: {failure}")
    return figures


def _scored(predictions: list[Prediction]) -> tuple[dict[str, float | str], str]:
    candidates = {p.image_id: p.caption for p in predictions}
    references = {p.image_id: p.references for p in predictions}
    try:
        scores = caption_scores(candidates, references, without=("SPICE",))
    except JavaError as error:
        return {}, str(error)
    failed = {name: why for name, why in scores.left_out.items() if name != "SPICE"}
    return {**scores.corpus, **failed}, ""


def _clip_scores(scorer: Judge, source: Source, predictions: list[Prediction]) -> dict[str, float]:
    """CLIPScore, RefCLIPScore and the mean cosine."""
    texts = [p.caption for p in predictions]
    references = [r for p in predictions for r in p.references]
    rows = [p.row for p in predictions]
    image_ND, text_MD = scorer.features(source, rows, [*texts, *references])
    ends = np.cumsum([len(p.references) for p in predictions])
    return clip_scores(
        image_ND.cpu().numpy(),
        text_MD[: len(texts)].cpu().numpy(),
        np.split(text_MD[len(texts) :].cpu().numpy(), ends[:-1]),
    )
