"""Labels of images, the best first, scored against a validation set's own."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote

import numpy as np
from PIL import Image

from engine.config.schema import RecognitionEval
from engine.data.bad_samples import BadRecord, summary
from engine.data.loader import valid_batches
from engine.data.text.labels import LabelText, clean, labels_of, lemmatiser
from engine.errors import FaultError, UserError
from engine.evals import classes
from engine.evals.evaluation import Generation, Result, json_line, rows_of_images
from engine.evals.inputs import Inputs
from engine.evals.predict import Predictor, evaluating
from engine.evals.scorers import Embed, Scorers
from engine.generate import labels as label_search
from engine.generate.label_search import label_log_probs
from engine.generate.labels import Label, attention_maps
from engine.logs.charts import precision_recall
from engine.logs.gallery import Example, weight_map
from engine.metrics import recognition as metrics
from engine.models.vision_language import Recognizer
from engine.run import Run
from engine.tasks.recognize import RecognizeTask
from engine.types import BadSample, Batch, Source

MODALITIES = ("labels",)

_MAX_LABEL_SET = 20_000  # labels that each image is asked about


@dataclass(frozen=True, slots=True)
class Recognised:
    """An image's labels, the best first, and its own."""

    image_id: str
    row: int  # of the source
    labels: list[Label]
    references: list[str] = field(default_factory=list)
    log_p: list[float] = field(default_factory=list)  # of each label of the set that is asked about

    def to_json(self) -> dict[str, Any]:
        """A line of a predictions file."""
        labels = [label.to_json() for label in self.labels]
        return json_line({"image_id": self.image_id, "labels": labels}, references=self.references)


class RecognitionEvaluation(Generation):
    """Of the validation sets, and of a folder of images."""

    name, title = "labels", "Labels of"

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self.section, self.scorers = self.config.eval.recognition, Scorers(run)

    @property
    def best(self) -> str:
        """F1 of as many labels as ``eval.recognition.k`` has first."""
        return f"exact_F1@{self.section.k[0]}"

    @property
    def num_examples(self) -> int:
        """Predictions of a validation set that are shown."""
        return self.section.num_examples

    def check(self) -> None:
        """Also what ranks labels, and how many of them there are to score."""
        super().check()
        self._check_labels()
        most, number = max(self.section.k), self.config.generate.num_labels
        if most > number:
            raise UserError(
                f"figures at k {most} are asked for, of {number} labels an image; raise "
                "generate.num_labels or leave that k out",
                key="eval.recognition.k",
            )
        _ = self.scorers.sentences

    def _check_labels(self) -> None:
        tokenizer = self.run.task.tokenizer
        assert tokenizer is not None
        label_search.check(self.config.generate, tokenizer.vocab_size)
        _ = self.scorers.ranker  # opened now: hours of work may come before it is asked

    def inputs(self) -> Inputs:
        """A folder of images."""
        source = super().inputs()
        self._check_labels()
        return source

    def score(self, model: Predictor, source: Source) -> Result:
        """Figures of the labels, and their precision-recall curve."""
        task = cast(RecognizeTask, model.task)
        codes, rows = rows_of_images(source, self.section.num_images or self.num_rows)
        own, bad = _references(source, codes, rows, task)
        used = np.array([row for row in rows.tolist() if own[int(codes[row])]], dtype=np.int64)
        label_set = _label_set(self.section, own, source.name, task.text)
        predictions, unread = self.predict(model, source, used, label_set)
        bad += unread
        if not predictions:
            number = len(np.unique(codes))
            raise FaultError(f"{source.name}: no image of {number} is usable: {summary(bad)}")
        predictions = [replace(p, references=own[int(codes[p.row])]) for p in predictions]
        found: dict[str, float | str] = {
            **score(predictions, self.section.k, self.scorers.sentences)
        }
        if label_set:
            scores = np.asarray([p.log_p for p in predictions])
            true = np.asarray([[a in p.references for a in label_set] for p in predictions])
            found["mAP"] = 100 * metrics.mean_average_precision(scores, true)
            found["chance_mAP"] = 100 * metrics.mean_average_precision(np.zeros_like(scores), true)
        return Result(found, bad, predictions, picture=curve(source.name, predictions))

    def predict(
        self, model: Predictor, source: Source, rows: np.ndarray, label_set: Sequence[str] = ()
    ) -> tuple[list[Recognised], list[BadRecord]]:
        """Labels of each row's image, and log p of each of ``label_set``."""
        task, module = cast(RecognizeTask, model.task), cast(Recognizer, model.model)
        section = self.config.generate

        def labels(batch: Batch) -> list[Any]:  # (labels, log p) of JSON values
            numbers = batch["index_B"].tolist()
            encoded = label_search.encode_prompt(task, module, batch["image_BCHW"])
            found = label_search.recognise(task, module, encoded, section, rows=numbers)
            log_p: list[list[float]] = [[] for _ in numbers]
            if label_set:
                ids = [task.text.ids(label) for label in label_set]
                log_p = label_log_probs(
                    module.decoder, encoded.state, ids, rows=section.label_rows
                ).tolist()
            plain = [[(a.text, a.prob, a.score, a.ids) for a in one] for one in found]
            return list(zip(plain, log_p, strict=True))

        every, bad = model.predict(
            source, rows, labels, collate=task.pictures, batch_size=section.batch_size
        )
        found = {
            row: [Label(t, p, s, tuple(i)) for t, p, s, i in one] for row, (one, _) in every.items()
        }
        if section.rank == "clip" and found:
            assert self.scorers.ranker is not None
            texts = [[label.text for label in one] for one in found.values()]
            cosines = self.scorers.ranker.cosines(source, list(found), texts)
            for row, scores in zip(found, cosines, strict=True):
                scored = [replace(a, score=c) for a, c in zip(found[row], scores, strict=True)]
                found[row] = label_search.ranked(scored, "clip")
        predictions = [
            Recognised(source[row].image_id, row, one[: section.num_labels], log_p=every[row][1])
            for row, one in found.items()
        ]
        return predictions, bad

    def example(self, source: Source, prediction: Recognised) -> Example:
        """An image with its own labels and those that it was given, with their probabilities."""
        given: list[tuple[str, float | None]] = [(a.text, a.prob) for a in prediction.labels]
        image = self.thumbnail(source, prediction.row)
        return Example(image, prediction.references, given, prediction.image_id)

    def more_files(
        self, folder: Path, model: Predictor, source: Source, predictions: Sequence[Recognised]
    ) -> str:
        """With ``generate.attention``, ``attention/IMAGE/``: a picture for each label."""
        if not self.config.generate.attention:
            return ""
        number = write_attention(folder / "attention", model, source, predictions)
        return f", {number} pictures: {folder / 'attention'}"


build = RecognitionEvaluation


def _references(
    source: Source, codes: np.ndarray, rows: np.ndarray, task: RecognizeTask
) -> tuple[dict[int, list[str]], list[BadRecord]]:
    """Labels of the wanted images, out of all their rows, by the image's code; and those images
    that have none."""
    first = {int(codes[row]): row for row in rows.tolist()}
    found: dict[int, dict[str, None]] = defaultdict(dict)
    keys: dict[int, str] = {}
    for row, code in enumerate(codes.tolist()):
        if code in first:
            try:
                record = source[row]
                keys[row] = record.key
                found[code] |= dict.fromkeys(labels_of(record, task.section))
            except BadSample:  # named where its image is read
                continue
    bad = [
        BadRecord(0, source.name, row, keys.get(row, f"row {row}"), "no label")
        for code, row in first.items()
        if not found[code]
    ]
    return {code: list(found[code]) for code in first}, bad


def _label_set(
    scoring: RecognitionEval, own: dict[int, list[str]], name: str, text: LabelText
) -> list[str]:
    """The labels that every image is asked about; none where nothing asks for them. UserError."""
    if scoring.label_set is None:
        return []
    try:
        if scoring.label_set == "dataset":
            found = sorted({label for labels in own.values() for label in labels})
        else:
            known = classes.load(scoring.label_set, dataset=name).classes
            found = clean(names[0] for names in known)
        if len(found) > _MAX_LABEL_SET:
            raise UserError(
                f"{name} has {len(found):,} labels, too many to ask each image about "
                f"({_MAX_LABEL_SET:,}); name a file of fewer"
            )
        for label in found:
            text.ids(label)
    except (UserError, BadSample) as error:
        raise UserError(str(error), key="eval.recognition.label_set") from error
    return found


# --- figures


def score(
    predictions: Sequence[Recognised], ks: Sequence[int], embed: Embed | None = None
) -> dict[str, float]:
    """Precision, recall and F1 at each k, in percent: word for word, by lemma where there is a
    lemmatiser, and by meaning where there is an encoder (``embed``). Beside them, F1 of naming
    the k labels that these images have most often, whatever an image shows (``commonest_…``)."""
    own = [p.references for p in predictions]
    given = [[label.text for label in p.labels][: max(ks)] for p in predictions]
    often = Counter(label for labels in own for label in labels).most_common(max(ks))
    vectors = _vectors([*given, *own], embed) if embed else None
    found = {}
    for kind, by_k in _scores(given, own, ks, vectors).items():
        for k, scores in by_k.items():
            found[f"{kind}_P@{k}"] = 100 * scores.precision
            found[f"{kind}_R@{k}"] = 100 * scores.recall
            found[f"{kind}_F1@{k}"] = 100 * scores.f1
    blind = _scores([[label for label, _ in often]] * len(own), own, ks, vectors)
    for kind, by_k in blind.items():
        found |= {f"commonest_{kind}_F1@{k}": 100 * scores.f1 for k, scores in by_k.items()}
    return found


def _scores(
    given: Sequence[Sequence[str]],
    own: Sequence[Sequence[str]],
    ks: Sequence[int],
    vectors: Callable[[Sequence[str]], np.ndarray] | None,
) -> dict[str, dict[int, metrics.Scores]]:
    """Scores by the kind of agreement and k."""
    kinds = {"exact": {k: metrics.exact(given, own, k) for k in ks}}
    if (lemma := lemmatiser()) is not None:
        kinds["lemma"] = {k: metrics.exact(given, own, k, lambda s: lemma(s.lower())) for k in ks}
    if vectors is not None:  # cosines [true, predicted] of each image's labels
        pairs = zip(own, given, strict=True)
        likeness = [vectors(true) @ vectors(given).T for true, given in pairs]
        kinds["semantic"] = {k: metrics.semantic(likeness, k) for k in ks}
    return kinds


def _vectors(
    label_lists: Sequence[Sequence[str]], embed: Embed
) -> Callable[[Sequence[str]], np.ndarray]:
    """Gives vectors [N, D] of any of these labels; every text is encoded once."""
    texts = sorted({label for labels in label_lists for label in labels})
    vector_ND, at = embed(texts), {text: place for place, text in enumerate(texts)}
    return lambda labels: vector_ND[[at[label] for label in labels]]


def curve(name: str, predictions: Sequence[Recognised]) -> Image.Image | None:
    """The precision-recall curve of all labels; None where none was given."""
    pairs = [[(label.text, label.prob) for label in p.labels] for p in predictions]
    found = metrics.curve(pairs, [p.references for p in predictions])
    if not found.precision.size:
        return None
    points = (found.recall.tolist(), found.precision.tolist())
    return precision_recall(f"Labels of {name}, word for word", {"by probability": points})


def write_attention(
    folder: Path, predictor: Predictor, source: Source, found: Sequence[Recognised]
) -> int:
    """A picture for each label of each image; returns their number.

    The image is shown as the model saw it, cropped and squeezed by the transforms.
    """
    task, model = cast(RecognizeTask, predictor.task), cast(Recognizer, predictor.model)
    labels = {one.row: one for one in found}
    batches = valid_batches(
        source, np.asarray(sorted(labels)), predictor.transform, task.pictures,
        batch_size=1, rank=0, world=1, num_workers=predictor.num_workers, limits=predictor.limits,
    )  # fmt: skip
    with evaluating(model):
        for _, batch, _ in batches:
            if not batch:
                continue
            one = labels[int(batch["index_B"][0])]
            image_1CHW = batch["image_BCHW"].to(predictor.device)
            with predictor.autocast():
                maps = attention_maps(task, model, image_1CHW, [a.ids for a in one.labels])
            seen = Image.fromarray(image_1CHW[0].permute(1, 2, 0).cpu().numpy())
            place = folder / one.image_id
            place.mkdir(parents=True, exist_ok=True)
            for earlier in place.glob("[0-9][0-9]_*.png"):  # of other labels
                earlier.unlink()
            for rank, (label, weight_hw) in enumerate(zip(one.labels, maps, strict=True), 1):
                drawn = weight_map(seen, weight_hw.cpu().numpy(), f"{label.text}  {label.prob:.3f}")
                drawn.save(place / f"{rank:02d}_{quote(label.text, safe=' ')[:80]}.png")
    return sum(len(one.labels) for one in found)
