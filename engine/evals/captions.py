"""Captions of images: one for each, scored against all references of a validation set's image."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from engine.config.schema import Generate
from engine.data.bad_samples import BadRecord, summary
from engine.dist import collectives
from engine.errors import FaultError
from engine.evals.evaluation import Generation, Result
from engine.evals.inputs import Folder, open_folder
from engine.evals.predict import Predictor
from engine.evals.scorers import ClipScorer, Scorers, same_model
from engine.generate.texts import generate_texts
from engine.logs.gallery import Example
from engine.metrics.captions import JavaError, caption_scores, need_scorers
from engine.metrics.clipscore import clip_scores
from engine.run import Run
from engine.types import Batch, Source

MODALITIES = ("caption",)
CIRCULAR = "the ranker: circular"

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
        line: dict[str, Any] = {"image_id": self.image_id, "caption": self.caption}
        if self.references:
            line["references"] = self.references
        if self.candidates:
            line |= {"candidates": self.candidates, "cosines": self.cosines}
        return line


def evaluate(
    model: Predictor,
    source: Source,
    section: Generate,
    *,
    instruction: str,
    num_images: int | None = None,
    ranker: ClipScorer | None = None,
    scorer: ClipScorer | None = None,
) -> Result:
    """Generate and score; every rank takes part and gets the same figures.

    Beside the figures stand, in words, what tokenized the captions and whose CLIPScore it is.
    """
    codes = np.asarray(source.column("image_id"))
    _, first = np.unique(codes, return_index=True)
    rows = np.sort(first)[:num_images]
    predictions, bad = speak(model, source, rows, section, instruction, ranker)
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
    return Result(metrics, bad, predictions)


def _content_scores(source: Source, predictions: Sequence[Prediction]) -> dict[str, float]:
    """Figures that the dataset itself has, beside the usual ones; most have none."""
    while source.below:
        source = source.below[0]
    if source.content_scores is None:
        return {}
    captions = [prediction.caption for prediction in predictions]
    return source.content_scores(captions, [prediction.references[0] for prediction in predictions])


def speak(
    model: Predictor,
    source: Source,
    rows: np.ndarray,
    section: Generate,
    instruction: str,
    ranker: ClipScorer | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> tuple[list[Prediction], list[BadRecord]]:
    """A caption for each of the rows' images, on every rank alike, and what could not be read.

    Of several texts the one that the ranker gives the highest score is taken, of equal ones the
    first. ``stopped`` is asked after each batch of a rank: no more follow.
    """

    def texts(batch: Batch) -> list[list[str]]:
        numbers = batch["index_B"].tolist()
        instructions = [instruction] * len(numbers)
        return generate_texts(
            model.task, model.model, batch["image_BCHW"], instructions, section, rows=numbers
        )

    found, bad = model.predict(
        source, rows, texts,
        collate=model.task.batch, batch_size=section.batch_size, stopped=stopped,
    )  # fmt: skip
    return best_of(source, found, ranker if section.method == "best_of_n" else None), bad


def best_of(
    source: Source, texts: dict[int, list[str]], ranker: ClipScorer | None
) -> list[Prediction]:
    """Of each row's texts the one that the ranker gives the highest score, of equal ones, or
    without a ranker, the first."""
    if not texts:
        return []
    cosines: list[list[float]] = [[] for _ in texts]
    if ranker is not None:
        cosines = ranker.cosines(source, list(texts), list(texts.values()))
    predictions = []
    for (row, several), scores in zip(texts.items(), cosines, strict=True):
        best = max(range(len(scores)), key=scores.__getitem__) if scores else 0
        candidates = several if len(several) > 1 else []
        predictions.append(
            Prediction(source[row].image_id, row, several[best], [], candidates, scores)
        )
    return predictions


def _references(source: Source, codes: np.ndarray, rows: np.ndarray) -> dict[int, list[str]]:
    """All captions of the wanted images, by the image's code."""
    wanted = set(codes[rows].tolist())
    found: dict[int, list[str]] = defaultdict(list)
    for code, caption in zip(codes.tolist(), source.captions(), strict=True):
        if code in wanted and caption:
            found[code].append(caption)
    return found


def exact_match(predictions: Sequence[Prediction]) -> float:
    """Share, in percent, of captions that equal a reference but for case."""
    exact = [p.caption.lower() in {r.lower() for r in p.references} for p in predictions]
    return 100 * sum(exact) / len(exact)


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


class CaptionEvaluation(Generation):
    """Of the validation sets, and of a folder of images."""

    best = "CIDEr"
    curves = ("CLIPScore",)
    name, title, unit = "captions", "Captions of", "image"
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

    def evaluate(self, dataset: str, model: Predictor) -> Result:
        """Figures of the captions, and the first few to look at."""
        source, section = self.open(dataset), self.config.eval.captions
        found = evaluate(
            model,
            source,
            self.config.generate,
            instruction=self.config.data.prompt.instruction,
            num_images=section.num_images or self.num_rows,
            ranker=self.scorers.ranker,
            scorer=self.scorers.scorer,
        )
        shown = found.predictions[: section.num_examples]
        found.examples = [self.example(source, one) for one in shown]
        return found

    def inputs(self) -> Folder:
        """A folder of images."""
        return open_folder(self.config.generate.input)

    def predict(
        self,
        model: Predictor,
        source: Source,
        rows: np.ndarray,
        stopped: Callable[[], bool] = lambda: False,
    ) -> tuple[list[Prediction], list[BadRecord]]:
        """A caption for each image."""
        instruction = self.config.data.prompt.instruction
        ranker = self.scorers.ranker
        return speak(model, source, rows, self.config.generate, instruction, ranker, stopped)

    def example(self, source: Source, prediction: Prediction) -> Example:
        """An image with its references and its caption; of best_of_n, the best few."""
        pairs = zip(prediction.candidates, prediction.cosines, strict=False)  # both or neither
        best = sorted(pairs, key=lambda pair: -pair[1])[:_NUM_CANDIDATES]
        found: list[tuple[str, float | None]] = [*best] or [(prediction.caption, None)]
        image = self.thumbnail(source, prediction.row)
        return Example(image, prediction.references, found, prediction.image_id)


def build(run: Run) -> CaptionEvaluation:
    """Scores of captions, and captions of a folder."""
    return CaptionEvaluation(run)
