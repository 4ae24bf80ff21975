"""Answers to a validation set's questions, generated or chosen, and how right they are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.config.schema import Generate
from engine.data.bad_samples import BadRecord, summary
from engine.data.loader import valid_batches
from engine.dist import collectives
from engine.errors import FaultError, UserError
from engine.evals.answers import KEY, Answer, choices
from engine.evals.encode import Encoder, evaluating
from engine.generate.likelihood import batch_likelihoods
from engine.generate.texts import generate_batch
from engine.metrics.vqa import Question, Scores, score
from engine.types import Batch, Sample, Source

_MOST_KINDS = 20  # of questions, and of answers, that are told one by one


@dataclass(frozen=True, slots=True)
class Answers:
    """What an evaluation found: figures, predictions in the order of rows, bad samples."""

    metrics: dict[str, float | str]
    predictions: list[Answer]
    bad: list[BadRecord]


def evaluate(
    encoder: Encoder, source: Source, section: Generate, *, num_rows: int | None = None
) -> Answers:
    """Answer and score the questions; every rank takes part and gets the same figures."""
    rows = np.arange(len(source))[:num_rows]
    predictions, bad = answer(encoder, source, rows, section)
    predictions = [p for p in predictions if p.references]
    if not predictions:
        told = summary(bad) if bad else "none of them has an answer to be held against"
        raise FaultError(f"{source.name}: none of the {len(rows)} questions is usable: {told}")
    return Answers(figures(predictions), predictions, bad)


def answer(
    encoder: Encoder,
    source: Source,
    rows: np.ndarray,
    section: Generate,
    *,
    stopped: Callable[[], bool] = lambda: False,
) -> tuple[list[Answer], list[BadRecord]]:
    """An answer to the question of each row, on every rank alike, and what could not be read.

    With ``generate.answers`` it is the likeliest of those, else it is generated. ``stopped`` is
    asked after each batch whether to leave out the rest.
    """
    task: Any = encoder.task
    allowed = choices(section)
    longest = max(allowed, key=lambda text: len(task.answer_ids(text)), default="")
    found: list[dict[str, Any]] = []
    bad: list[BadRecord] = []
    limits = replace(
        encoder.limits,
        text_alone=task.text_alone,
        usable=task.askable,
    )
    batches = valid_batches(
        source,
        rows,
        encoder.transform,
        _WithQuestions(task.prompt_batch),
        batch_size=section.batch_size,
        rank=collectives.rank(),
        world=collectives.world(),
        num_workers=encoder.num_workers,
        limits=limits,
    )
    devices = [encoder.device] if encoder.device.type == "cuda" else []
    with evaluating(encoder.model), torch.no_grad(), torch.random.fork_rng(devices):
        for _, batch, bad_here in batches:
            bad += bad_here
            if batch:
                asked = batch.pop("asked")
                with encoder.autocast():
                    said = _answers(encoder, batch, section, allowed, longest)
                found += [a | s for a, s in zip(asked, said, strict=True)]
            if stopped():
                break
    return _of_all_ranks(found, bad)


def _of_all_ranks(
    found: list[dict[str, Any]], bad: list[BadRecord]
) -> tuple[list[Answer], list[BadRecord]]:
    """Every rank's, in the order of rows."""
    gathered = collectives.all_gather_json([found, [b.to_json() for b in bad]])
    every = [
        Answer(**{**entry, "references": tuple(entry["references"])})
        for entries, _ in gathered
        for entry in entries
    ]
    bad = [BadRecord(**record) for _, records in gathered for record in records]
    return sorted(every, key=lambda one: one.row), bad


def _answers(
    encoder: Encoder, batch: Batch, section: Generate, allowed: Sequence[str], longest: str
) -> list[dict[str, Any]]:
    """``answer``, and ``probability`` where answers are ``allowed``."""
    task: Any = encoder.task
    model: Any = encoder.model
    numbers = batch["index_B"].tolist()
    moved = {
        name: value.to(encoder.device) if isinstance(value, Tensor) else value
        for name, value in batch.items()
    }
    if not allowed:
        texts = generate_batch(task, model, moved, section)
        return [{"answer": several[0]} for several in texts]
    taken, room = len(task.answer_ids(longest)), task.room(moved["input_ids_BT"])
    if taken > room:
        raise UserError(
            f"the answer {longest!r} takes {taken} tokens, and a prompt leaves it {room} of "
            f"{task.max_length}; raise model.decoder.max_length",
            key=KEY,
        )
    likely = batch_likelihoods(task, model, moved, [allowed] * len(numbers))
    share_BA = likely.log_p_R.double().view(len(numbers), len(allowed)).softmax(1)
    best = share_BA.max(1)
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [{"answer": allowed[place], "probability": share} for place, share in pairs]


def figures(predictions: Sequence[Answer]) -> dict[str, float | str]:
    """Figures of ``engine.metrics.vqa`` under flat names; ``answer:KIND`` and ``question:KIND`` are
    the accuracy of one kind.

    ``accuracy`` is the official one; where each question has a single answer, of which that takes
    no note, it is exact match.
    """
    alone = all(len(p.references) == 1 for p in predictions)
    questions = {
        str(p.row): Question(p.references, p.answer_type or None, p.question_type or None)
        for p in predictions
    }
    found: Scores = score(questions, {str(p.row): p.answer for p in predictions}, exact=alone)
    told: dict[str, float | str] = {
        "accuracy": found.overall,
        "majority_accuracy": found.majority["overall"],
        "majority_by_question": found.majority["overall_by_question_type"],
        "exact_match": found.exact_match,
        "gqa_accuracy": found.gqa["accuracy"],
    }
    told |= _by_kind("answer", found.per_answer_type, Counter(q.kind for q in questions.values()))
    asked = Counter(q.question_type for q in questions.values() if q.question_type)
    told |= _by_kind("question", found.per_question_type, asked)
    told |= {f"yes_no_{name}": value for name, value in found.yes_no.items()}
    told["majority_answer"] = found.majority["answer"]
    told["accuracy_is"] = "exact match" if alone else "VQA v2"
    return told


def _by_kind(of: str, scores: dict[str, float], counts: Counter[str]) -> dict[str, float]:
    """Figures of the commonest kinds; a slash would part a metric's name from its dataset's."""
    common = sorted(kind for kind, _ in counts.most_common(_MOST_KINDS))
    return {f"{of}:{kind.replace('/', '_')}": scores[kind] for kind in common}


class _WithQuestions:
    """The task's collate, with what is known of each sample beside it."""

    def __init__(self, collate: Callable[[list[Sample]], Batch]) -> None:
        self.collate = collate

    def __call__(self, samples: list[Sample]) -> Batch:
        return self.collate(samples) | {"asked": [_asked(sample) for sample in samples]}


def _asked(sample: Sample) -> dict[str, Any]:
    row = sample.row
    questions = [text for role, text in row.turns if role == "human"]
    told = row.turns[-1][1] if row.turns and row.turns[-1][0] == "gpt" else None
    return {
        "question_id": row.caption_id,
        "image_id": row.image_id,
        "row": sample.index,
        "question": questions[-1] if questions else "",
        "references": list(row.answers) or ([] if told is None else [told]),
        "question_type": row.question_type,
        "answer_type": row.answer_type,
    }
