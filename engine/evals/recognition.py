"""Labels of a validation set: those that a model gives each image, scored against its own."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image

from engine.config.schema import Generate, RecognitionEval
from engine.data.bad_samples import BadRecord, summary
from engine.data.loader import valid_batches
from engine.data.text.labels import LabelText, clean, labels_of
from engine.dist import collectives
from engine.errors import FaultError, UserError
from engine.evals import prompts
from engine.evals.encode import Encoder, evaluating
from engine.evals.recognised import Recognised, curve, score
from engine.evals.sentences import Embed
from engine.generate import labels as label_search
from engine.generate.labels import Label
from engine.metrics import recognition as metrics
from engine.types import BadSample, Source

_MAX_LABEL_SET = 20_000  # labels that each image is asked about


@dataclass(frozen=True, slots=True)
class Recognition:
    """What an evaluation found: figures in percent, predictions by row, bad samples, the curve."""

    metrics: dict[str, float]
    predictions: list[Recognised]
    bad: list[BadRecord]
    curve: Image.Image | None


def evaluate(
    encoder: Encoder,
    source: Source,
    section: Generate,
    scoring: RecognitionEval,
    *,
    num_images: int | None = None,
    ranker: Any = None,
    embed: Embed | None = None,
) -> Recognition:
    """Recognise and score; every rank takes part and gets the same figures."""
    task: Any = encoder.task
    codes = np.asarray(source.column("image_id"))
    _, first = np.unique(codes, return_index=True)
    rows = np.sort(first)[:num_images]
    own, bad = _references(source, codes, rows, task.section)
    rows = np.array([row for row in rows.tolist() if own[int(codes[row])]], dtype=np.int64)
    label_set = _label_set(scoring, own, source.name, task.text)
    predictions, log_p, unread = recognise(encoder, source, rows, section, ranker, label_set)
    bad += unread
    if not predictions:
        raise FaultError(f"{source.name}: no image of {len(first)} is usable: {summary(bad)}")
    predictions = [replace(p, references=own[int(codes[p.row])]) for p in predictions]
    found = score(predictions, scoring.k, embed)
    if label_set:
        scores = np.asarray([log_p[p.row] for p in predictions])
        is_true = np.asarray([[a in p.references for a in label_set] for p in predictions])
        found["mAP"] = 100 * metrics.mean_average_precision(scores, is_true)
        found["chance_mAP"] = 100 * metrics.mean_average_precision(np.zeros_like(scores), is_true)
    return Recognition(found, predictions, bad, curve(source.name, predictions))


def recognise(
    encoder: Encoder,
    source: Source,
    rows: np.ndarray,
    section: Generate,
    ranker: Any = None,
    label_set: Sequence[str] = (),
    stopped: Callable[[], bool] = lambda: False,
) -> tuple[list[Recognised], dict[int, list[float]], list[BadRecord]]:
    """Labels of the rows' images, on every rank alike; log p of each of ``label_set``, by row; and
    what could not be read. ``stopped`` is asked after each batch of a rank: no more follow."""
    found, log_p, bad = _generate(encoder, source, rows, section, label_set, stopped)
    done = sorted(found)
    if section.rank == "clip" and done:
        texts = [[label.text for label in found[row]] for row in done]
        cosines = ranker.cosines(source, done, texts)
        for row, liked in zip(done, cosines, strict=True):
            scored = [replace(a, score=c) for a, c in zip(found[row], liked, strict=True)]
            found[row] = label_search.ranked(scored, "clip")
    predictions = [
        Recognised(source[row].image_id, row, found[row][: section.num_labels]) for row in done
    ]
    return predictions, log_p, bad


def _generate(
    encoder: Encoder,
    source: Source,
    rows: np.ndarray,
    section: Generate,
    label_set: Sequence[str],
    stopped: Callable[[], bool],
) -> tuple[dict[int, list[Label]], dict[int, list[float]], list[BadRecord]]:
    task: Any = encoder.task
    model: Any = encoder.model
    told: list[Any] = []  # (row, labels, log p), of JSON values
    bad: list[BadRecord] = []
    batches = valid_batches(
        source,
        rows,
        encoder.transform,
        task.pictures,
        batch_size=section.batch_size,
        rank=collectives.rank(),
        world=collectives.world(),
        num_workers=encoder.num_workers,
        limits=encoder.limits,
    )
    with evaluating(encoder.model), torch.no_grad():
        for _, batch, bad_here in batches:
            bad += bad_here
            if not batch:
                continue
            here = batch["index_B"].tolist()
            with encoder.autocast():
                image_BCHW = batch["image_BCHW"].to(encoder.device)
                encoded = label_search.encode_prompt(task, model, image_BCHW)
                labels = label_search.recognise(task, model, encoded, section, rows=here)
                log_p: list[list[float]] = [[] for _ in here]
                if label_set:
                    log_p = label_search.log_probs(
                        task, model, encoded, label_set, rows=section.label_rows
                    ).tolist()
            plain = [[(a.text, a.prob, a.score, a.ids) for a in one] for one in labels]
            told += zip(here, plain, log_p, strict=True)
            if stopped():
                break
    gathered = collectives.all_gather_json([told, [one.to_json() for one in bad]])
    every = [entry for part, _ in gathered for entry in part]
    found = {row: [Label(t, p, s, tuple(i)) for t, p, s, i in labels] for row, labels, _ in every}
    bad = [BadRecord(**record) for _, records in gathered for record in records]
    return found, {row: log_p for row, _, log_p in every}, bad


def _references(
    source: Source, codes: np.ndarray, rows: np.ndarray, section: Any
) -> tuple[dict[int, list[str]], list[BadRecord]]:
    """Labels of the wanted images, out of all their rows, by the image's code; and those images
    that have none."""
    first = {int(codes[row]): row for row in rows.tolist()}
    found: dict[int, list[str]] = defaultdict(list)
    for row, code in enumerate(codes.tolist()):
        if code in first:
            try:
                found[code] += labels_of(source[row], section)
            except BadSample:  # named where its image is read
                continue
    bad = [
        BadRecord(0, source.name, row, _key(source, row), "no label", "")
        for code, row in first.items()
        if not found[code]
    ]
    return {code: list(dict.fromkeys(found[code])) for code in first}, bad


def _key(source: Source, row: int) -> str:
    try:
        return source[row].key
    except BadSample:
        return f"row {row}"


def _label_set(
    scoring: RecognitionEval, own: dict[int, list[str]], name: str, text: LabelText
) -> list[str]:
    """The labels that every image is asked about; none where nothing asks for them. UserError."""
    if scoring.label_set is None:
        return []
    key = "eval.recognition.label_set"
    if scoring.label_set == "dataset":
        found = sorted({label for labels in own.values() for label in labels})
    else:
        try:
            classes = prompts.load(scoring.label_set, dataset=name).classes
        except UserError as error:
            error.key = key
            raise
        found = clean(names[0] for names in classes)
    if len(found) > _MAX_LABEL_SET:
        raise UserError(
            f"{name} has {len(found):,} labels, too many to ask each image about "
            f"({_MAX_LABEL_SET:,}); name a file of fewer",
            key=key,
        )
    for label in found:
        try:
            text.ids(label)
        except BadSample as bad:
            raise UserError(str(bad), key=key) from bad
    return found
