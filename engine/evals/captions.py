"""Captions of images: one for each, scored against all references of a validation set's image."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np

from engine.data.bad_samples import BadRecord, summary
from engine.dist import collectives
from engine.errors import FaultError
from engine.evals.evaluation import Generation, Result, json_line, rows_of_images
from engine.evals.predict import Predictor
from engine.evals.scorers import ClipScorer, Scorers, same_model
from engine.generate.texts import generate_texts
from engine.logs.gallery import Example
from engine.metrics.captions import JavaError, caption_scores, need_scorers
from engine.metrics.clipscore import clip_scores
from engine.models.vision_language import VisionLanguage
from engine.run import Run
from engine.tasks.caption import CaptionTask
from engine.types import Batch, Source

MODALITIES = ("caption",)

_NUM_CANDIDATES = 3  # shown of best_of_n's


@dataclass(frozen=True, slots=True)
class Prediction:
    """An image's generated caption, and those that people gave it."""

    image_id: str
    row: int  # of the source
    caption: str
    references: list[str]
    candidates: list[str] = field(default_factory=list)  # of best_of_n
    cosines: list[float] = field(default_factory=list)  # of the candidates, by the ranker

    def to_json(self) -> dict[str, Any]:
        """A line of a predictions file."""
        return json_line(
            {"image_id": self.image_id, "caption": self.caption},
            references=self.references,
            candidates=self.candidates,
            cosines=self.cosines if self.candidates else [],
        )


class CaptionEvaluation(Generation):
    """Of the validation sets, and of a folder of images."""

    best = "CIDEr"
    curves = ("CLIPScore",)
    results_file = "captions_coco.json"

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self.scorers = Scorers(run)

    def check(self) -> None:
        """Also the scorers: one that also ranks is worth a warning."""
        super().check()
        need_scorers()
        ranker, scorer = self.scorers.ranker, self.scorers.scorer
        circular = ranker is not None and scorer is not None and same_model(ranker, scorer)
        if circular and collectives.rank() == 0:
            self.run.warn("CLIPScore will be by the model that chooses the captions: circular")

    def score(self, model: Predictor, source: Source) -> Result:
        """Also, in words, what tokenized the captions and whose CLIPScore it is."""
        codes, rows = rows_of_images(source, self.config.eval.captions.num_images or self.num_rows)
        predictions, bad = self.predict(model, source, rows)
        if not predictions:
            raise FaultError(
                f"{source.name}: none of the {len(rows)} images is usable: {summary(bad)}"
            )
        wanted, references = set(codes[rows].tolist()), defaultdict[int, list[str]](list)
        for code, caption in zip(codes.tolist(), source.captions(), strict=True):
            if code in wanted and caption:
                references[code].append(caption)
        for prediction in predictions:
            prediction.references.extend(references[int(codes[prediction.row])])
        predictions = [prediction for prediction in predictions if prediction.references]
        if not predictions:
            raise FaultError(f"{source.name}: none of the {len(rows)} images has a caption")
        exact = [p.caption.lower() in map(str.lower, p.references) for p in predictions]
        metrics = {**score(predictions), "exact_match": 100 * sum(exact) / len(exact)}
        metrics |= _content_scores(source, predictions)
        ranker, scorer = self.scorers.ranker, self.scorers.scorer
        if scorer is not None:
            metrics |= _clip_scores(scorer, source, predictions)
            if ranker is not None and self.config.generate.method == "best_of_n":
                circular = same_model(ranker, scorer)
                metrics["scorer"] = "the ranker: circular" if circular else "not the ranker"
        metrics["tokenizer"] = "PTB by Java"
        return Result(metrics, bad, predictions)

    def predict(
        self, model: Predictor, source: Source, rows: np.ndarray
    ) -> tuple[list[Prediction], list[BadRecord]]:
        """A caption for each row's image: of several the one that the ranker likes most."""
        task, speaker = cast(CaptionTask, model.task), cast(VisionLanguage, model.model)
        section, instruction = self.config.generate, self.config.data.prompt.instruction

        def texts(batch: Batch) -> list[list[str]]:
            numbers = batch["index_B"].tolist()
            instructions = [instruction] * len(numbers)
            images = batch["image_BCHW"]
            return generate_texts(task, speaker, images, instructions, section, rows=numbers)

        found, bad = model.predict(
            source, rows, texts, collate=task.batch, batch_size=section.batch_size
        )
        ranker = self.scorers.ranker if section.method == "best_of_n" else None
        return best_of(source, found, ranker), bad

    def example(self, source: Source, prediction: Prediction) -> Example:
        """An image with its references and its caption; of best_of_n, the best few."""
        pairs = zip(prediction.candidates, prediction.cosines, strict=False)  # both or neither
        best = sorted(pairs, key=lambda pair: -pair[1])[:_NUM_CANDIDATES]
        found: list[tuple[str, float | None]] = [*best] or [(prediction.caption, None)]
        image = self.thumbnail(source, prediction.row)
        return Example(image, prediction.references, found, prediction.image_id)


build = CaptionEvaluation


def best_of(
    source: Source, texts: dict[int, list[str]], ranker: ClipScorer | None
) -> list[Prediction]:
    """Of each row's texts the one that the ranker gives the highest score, of equal ones, or
    without a ranker, the first."""
    cosines: list[list[float]] = [[] for _ in texts]
    if ranker is not None and texts:
        cosines = ranker.cosines(source, list(texts), list(texts.values()))
    predictions = []
    for (row, several), scores in zip(texts.items(), cosines, strict=True):
        best = max(range(len(scores)), key=scores.__getitem__) if scores else 0
        candidates = several if len(several) > 1 else []
        predictions.append(
            Prediction(source[row].image_id, row, several[best], [], candidates, scores)
        )
    return predictions


def score(predictions: list[Prediction]) -> dict[str, float | str]:
    """Caption metrics but SPICE, which takes a download; the same on every rank.

    Rank 0 scores for all, so that a machine starts Java once. METEOR, where it fails, says why.
    """
    found: list[Any] = [{}, ""]  # the figures, and why there are none
    if collectives.rank() == 0:
        candidates = {p.image_id: p.caption for p in predictions}
        references = {p.image_id: p.references for p in predictions}
        try:
            scores = caption_scores(candidates, references, without=("SPICE",))
        except JavaError as error:
            found[1] = str(error)
        else:
            failed = {name: why for name, why in scores.left_out.items() if name != "SPICE"}
            found[0] = {**scores.corpus, **failed}
    figures, failure = collectives.broadcast_json(found)
    if failure:
        raise FaultError(f"the captions cannot be scored: {failure}")
    return figures


def _content_scores(source: Source, predictions: Sequence[Prediction]) -> dict[str, float]:
    """Figures that the dataset itself has, beside the usual ones; most have none."""
    while source.below:
        source = source.below[0]
    if source.content_scores is None:
        return {}
    captions = [prediction.caption for prediction in predictions]
    return source.content_scores(captions, [prediction.references[0] for prediction in predictions])


def _clip_scores(
    scorer: ClipScorer, source: Source, predictions: list[Prediction]
) -> dict[str, float]:
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
