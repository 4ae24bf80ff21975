"""Answers to questions about images, generated or chosen, and how right they are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from engine.config.schema import Generate
from engine.data.bad_samples import BadRecord, summary
from engine.errors import FaultError, UserError
from engine.evals.evaluation import Generation, Result, json_line
from engine.evals.inputs import Questions, open_questions
from engine.evals.predict import Predictor
from engine.generate.likelihood import batch_likelihoods
from engine.generate.texts import generate_batch
from engine.logs.gallery import Example
from engine.metrics import files
from engine.metrics.vqa import Question, Scores, score
from engine.models.vision_language import VisionLanguage
from engine.tasks.vqa import VqaTask
from engine.types import Batch, Row, Source

MODALITIES = ("answer",)
KEY = "generate.answers"

_MOST_KINDS = 20  # of questions, and of answers, that are reported one by one


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer to a row's last question."""

    record: Row
    row: int  # of the source
    answer: str
    probability: float | None = None  # among the answers that it was chosen from

    @property
    def question(self) -> str:
        """The last that is asked."""
        questions = [text for role, text in self.record.turns if role == "human"]
        return questions[-1] if questions else ""

    @property
    def references(self) -> tuple[str, ...]:
        """The annotators' answers; without any the dataset's own."""
        turns = self.record.turns
        own = (turns[-1][1],) if turns and turns[-1][0] == "gpt" else ()
        return self.record.answers or own

    def to_json(self) -> dict[str, Any]:
        """A line of a predictions file; ``question_id`` and ``answer`` are the official form."""
        required = {
            "question_id": self.record.caption_id,
            "image_id": self.record.image_id,
            "question": self.question,
            "answer": self.answer,
        }
        return json_line(
            required,
            answers=list(self.references),
            question_type=self.record.question_type,
            answer_type=self.record.answer_type,
            probability=self.probability,
        )


class VqaEvaluation(Generation):
    """Of the validation sets, and of a file of questions."""

    best = "accuracy"
    name, title, unit = "answers", "Answers to", "question"
    results_file = "answers_vqa.json"

    def check(self) -> None:
        """Also the list of allowed answers."""
        super().check()
        choices(self.config.generate)

    def score(self, model: Predictor, source: Source) -> Result:
        """Figures of the answers to those questions that have any."""
        rows = np.arange(len(source))[: self.num_rows]
        predictions, bad = self.predict(model, source, rows)
        predictions = [p for p in predictions if p.references]
        if not predictions:
            why = summary(bad) if bad else "none of them has an answer to be compared with"
            raise FaultError(f"{source.name}: none of the {len(rows)} questions is usable: {why}")
        return Result(figures(predictions), bad, predictions)

    def inputs(self) -> Questions:
        """A file of questions."""
        section = self.config.generate
        choices(section)
        return open_questions(section.input, section.images)

    def predict(
        self, model: Predictor, source: Source, rows: np.ndarray
    ) -> tuple[list[Answer], list[BadRecord]]:
        """An answer to each question: the likeliest of ``generate.answers``, else a generated
        one."""
        task, speaker = cast(VqaTask, model.task), cast(VisionLanguage, model.model)
        section = self.config.generate
        allowed = choices(section)

        def answers(batch: Batch) -> Sequence[tuple[str, float | None]]:
            if allowed:
                return _chosen(task, speaker, batch, allowed)
            return [(texts[0], None) for texts in generate_batch(task, speaker, batch, section)]

        limits = replace(model.limits, text_alone=task.text_alone, usable=task.askable)
        found, bad = model.predict(
            source, rows, answers, collate=task.prompt_batch, batch_size=section.batch_size,
            limits=limits,
        )  # fmt: skip
        return [Answer(source[row], row, *one) for row, one in found.items()], bad

    def example(self, source: Source, prediction: Answer) -> Example:
        """An answered question, with the annotators' answers, the commonest first."""
        own = [text for text, _ in Counter(prediction.references).most_common()]
        return Example(
            self.thumbnail(source, prediction.row),
            own,
            [(prediction.answer, prediction.probability)],
            f"{prediction.question} · {prediction.record.image_id}",
        )


build = VqaEvaluation


def choices(section: Generate) -> list[str]:
    """The answers that ``generate.answers`` allows; none where all are. Raises UserError."""
    if section.method == "best_of_n":
        raise UserError(
            "best_of_n chooses captions; answers take greedy, beam or sample",
            key="generate.method",
        )
    given = section.answers
    if given is None:
        return []
    if isinstance(given, str):
        given = _of_file(Path(given))
    counts = Counter(given)
    twice = next((text for text, times in counts.items() if times > 1), None)
    if twice or not counts or not all(text.strip() for text in given):
        what = f"has {twice!r} twice" if twice else "has an empty one" if counts else "is empty"
        raise UserError(f"the list of answers {what}", key=KEY)
    return given


def _of_file(path: Path) -> list[str]:
    """A JSON list of texts, or a text an answer a line."""
    try:
        loaded = files.load(path) if path.suffix == ".json" else files.text(path).splitlines()
    except UserError as error:
        raise UserError(f"answers, one a line, cannot be read: {error}", key=KEY) from error
    if not isinstance(loaded, list) or not all(isinstance(one, str) for one in loaded):
        raise UserError(f"{path} is not a JSON list of texts", key=KEY)
    return loaded


def _chosen(
    task: VqaTask, model: VisionLanguage, batch: Batch, allowed: Sequence[str]
) -> list[tuple[str, float]]:
    """The likeliest of the allowed answers to each question, with its probability among them."""
    longest = max(allowed, key=lambda text: len(task.answer_ids(text)))
    taken, room = len(task.answer_ids(longest)), task.room(batch["input_ids_BT"])
    if taken > room:
        raise UserError(
            f"the answer {longest!r} takes {taken} tokens, and a prompt leaves it {room} of "
            f"{task.max_length}; raise model.decoder.max_length",
            key=KEY,
        )
    number = len(batch["input_ids_BT"])
    likely = batch_likelihoods(task, model, batch, [allowed] * number)
    best = likely.log_p_R.double().view(number, len(allowed)).softmax(1).max(1)
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [(allowed[place], probability) for place, probability in pairs]


def figures(predictions: Sequence[Answer]) -> dict[str, float | str]:
    """Figures of ``engine.metrics.vqa`` under flat names; ``answer:KIND`` and ``question:KIND`` are
    the accuracy of one kind.

    ``accuracy`` is the official one; where each question has a single answer, of which that takes
    no note, it is exact match.
    """
    alone = all(len(p.references) == 1 for p in predictions)
    questions = {
        str(p.row): Question(
            p.references, p.record.answer_type or None, p.record.question_type or None
        )
        for p in predictions
    }
    scores: Scores = score(questions, {str(p.row): p.answer for p in predictions}, exact=alone)
    asked = [q.question_type for q in questions.values() if q.question_type]
    return {
        "accuracy": scores.overall,
        "majority_accuracy": scores.majority["overall"],
        "majority_by_question": scores.majority["overall_by_question_type"],
        "exact_match": scores.exact_match,
        "gqa_accuracy": scores.gqa["accuracy"],
        **_by_kind("answer", scores.per_answer_type, [q.kind for q in questions.values()]),
        **_by_kind("question", scores.per_question_type, asked),
        **{f"yes_no_{name}": value for name, value in scores.yes_no.items()},
        "majority_answer": scores.majority["answer"],
        "accuracy_is": "exact match" if alone else "VQA v2",
    }


def _by_kind(of: str, scores: dict[str, float], kinds: Sequence[str]) -> dict[str, float]:
    """Figures of the commonest kinds; a slash would part a metric's name from its dataset's."""
    common = sorted(kind for kind, _ in Counter(kinds).most_common(_MOST_KINDS))
    return {f"{of}:{kind.replace('/', '_')}": scores[kind] for kind in common}
