"""Answers to questions about images, generated or chosen, and how right they are."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from engine.config.schema import Generate
from engine.data.bad_samples import BadRecord, summary
from engine.errors import FaultError, UserError
from engine.evals.evaluation import Generation, Result
from engine.evals.inputs import Questions, open_questions
from engine.evals.predict import Predictor
from engine.generate.likelihood import batch_likelihoods
from engine.generate.texts import generate_batch
from engine.logs.gallery import Example
from engine.metrics.vqa import Question, Scores, score
from engine.run import Run
from engine.types import Batch, Row, Source

MODALITIES = ("answer",)
KEY = "generate.answers"

_MOST_KINDS = 20  # of questions, and of answers, that are reported one by one


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer to a question, and those that annotators gave."""

    question_id: str
    image_id: str
    row: int  # of the source
    question: str
    answer: str
    references: tuple[str, ...]
    question_type: str = ""
    answer_type: str = ""
    probability: float | None = None  # among the answers that it was chosen from

    @classmethod
    def of(cls, record: Row, row: int, answer: str, probability: float | None) -> Answer:
        """The answer to a row's last question; a row without annotators' has the dataset's own."""
        turns = record.turns
        questions = [text for role, text in turns if role == "human"]
        own = (turns[-1][1],) if turns and turns[-1][0] == "gpt" else ()
        return cls(
            record.caption_id,
            record.image_id,
            row,
            questions[-1] if questions else "",
            answer,
            record.answers or own,
            record.question_type,
            record.answer_type,
            probability,
        )

    def to_json(self) -> dict[str, Any]:
        """A line of a predictions file; ``question_id`` and ``answer`` are the official form."""
        line: dict[str, Any] = {
            "question_id": self.question_id,
            "image_id": self.image_id,
            "question": self.question,
            "answer": self.answer,
        }
        if self.references:
            line["answers"] = list(self.references)
        if self.question_type:
            line["question_type"] = self.question_type
        if self.answer_type:
            line["answer_type"] = self.answer_type
        if self.probability is not None:
            line["probability"] = self.probability
        return line


# --- which answers are allowed


def choices(section: Generate) -> list[str]:
    """The answers that ``generate.answers`` allows; none where all are. Raises UserError."""
    if section.method == "best_of_n":
        raise UserError(
            "best_of_n chooses captions; answers take greedy, beam or sample",
            key="generate.method",
        )
    given = section.answers
    if isinstance(given, str):
        given = _of_file(Path(given))
    elif given is None:
        return []
    found = list(dict.fromkeys(given))
    if len(found) < len(given) or not all(text.strip() for text in found) or not found:
        twice = next((text for text, times in Counter(given).items() if times > 1), None)
        what = "is empty" if not found else f"has {twice!r} twice" if twice else "has an empty one"
        raise UserError(f"the list of answers {what}", key=KEY)
    return found


def _of_file(path: Path) -> list[str]:
    """A JSON list of texts, or a text an answer a line."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        loaded = json.loads(text) if path.suffix == ".json" else text.splitlines()
    except FileNotFoundError as error:
        raise UserError(f"there is no file {path} of answers, one a line", key=KEY) from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}", key=KEY) from error
    if not isinstance(loaded, list) or not all(isinstance(one, str) for one in loaded):
        raise UserError(f"{path} is not a JSON list of texts", key=KEY)
    return loaded


# --- answers and their figures


def evaluate(
    model: Predictor, source: Source, section: Generate, *, num_rows: int | None = None
) -> Result:
    """Answer and score the questions; every rank takes part and gets the same figures."""
    rows = np.arange(len(source))[:num_rows]
    predictions, bad = answer(model, source, rows, section)
    predictions = [p for p in predictions if p.references]
    if not predictions:
        why = summary(bad) if bad else "none of them has an answer to be compared with"
        raise FaultError(f"{source.name}: none of the {len(rows)} questions is usable: {why}")
    return Result(figures(predictions), bad, predictions)


def answer(
    model: Predictor,
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
    task: Any = model.task
    allowed = choices(section)

    def answers(batch: Batch) -> Sequence[tuple[str, float | None]]:
        if allowed:
            return _chosen(model, batch, allowed)
        return [(texts[0], None) for texts in generate_batch(task, model.model, batch, section)]

    limits = replace(
        model.limits,
        text_alone=task.text_alone,
        usable=task.askable,
    )
    found, bad = model.predict(
        source, rows, answers, collate=task.prompt_batch, batch_size=section.batch_size,
        limits=limits, stopped=stopped,
    )  # fmt: skip
    return [Answer.of(source[row], row, *one) for row, one in found.items()], bad


def _chosen(model: Predictor, batch: Batch, allowed: Sequence[str]) -> list[tuple[str, float]]:
    """The likeliest of the allowed answers to each question, with its probability among them."""
    task: Any = model.task
    longest = max(allowed, key=lambda text: len(task.answer_ids(text)))
    taken, room = len(task.answer_ids(longest)), task.room(batch["input_ids_BT"])
    if taken > room:
        raise UserError(
            f"the answer {longest!r} takes {taken} tokens, and a prompt leaves it {room} of "
            f"{task.max_length}; raise model.decoder.max_length",
            key=KEY,
        )
    number = len(batch["input_ids_BT"])
    likely = batch_likelihoods(task, model.model, batch, [allowed] * number)
    share_BA = likely.log_p_R.double().view(number, len(allowed)).softmax(1)
    best = share_BA.max(1)
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [(allowed[place], share) for place, share in pairs]


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
    scores: Scores = score(questions, {str(p.row): p.answer for p in predictions}, exact=alone)
    found: dict[str, float | str] = {
        "accuracy": scores.overall,
        "majority_accuracy": scores.majority["overall"],
        "majority_by_question": scores.majority["overall_by_question_type"],
        "exact_match": scores.exact_match,
        "gqa_accuracy": scores.gqa["accuracy"],
    }
    found |= _by_kind("answer", scores.per_answer_type, Counter(q.kind for q in questions.values()))
    asked = Counter(q.question_type for q in questions.values() if q.question_type)
    found |= _by_kind("question", scores.per_question_type, asked)
    found |= {f"yes_no_{name}": value for name, value in scores.yes_no.items()}
    found["majority_answer"] = scores.majority["answer"]
    found["accuracy_is"] = "exact match" if alone else "VQA v2"
    return found


def _by_kind(of: str, scores: dict[str, float], counts: Counter[str]) -> dict[str, float]:
    """Figures of the commonest kinds; a slash would part a metric's name from its dataset's."""
    common = sorted(kind for kind, _ in counts.most_common(_MOST_KINDS))
    return {f"{of}:{kind.replace('/', '_')}": scores[kind] for kind in common}


class VqaEvaluation(Generation):
    """Of the validation sets, and of a file of questions."""

    best = "accuracy"
    name, title, unit = "answers", "Answers to", "question"
    results_file = "answers_vqa.json"

    def check(self) -> None:
        """Also the list of allowed answers."""
        super().check()
        choices(self.config.generate)

    def evaluate(self, dataset: str, model: Predictor) -> Result:
        """Figures of the answers, and the first few to look at."""
        source = self.open(dataset)
        found = evaluate(model, source, self.config.generate, num_rows=self.num_rows)
        shown = found.predictions[: self.config.eval.captions.num_examples]
        found.examples = [self.example(source, one) for one in shown]
        return found

    def inputs(self) -> Questions:
        """A file of questions."""
        section = self.config.generate
        choices(section)
        return open_questions(section.input, section.images)

    def predict(
        self,
        model: Predictor,
        source: Source,
        rows: np.ndarray,
        stopped: Callable[[], bool] = lambda: False,
    ) -> tuple[list[Answer], list[BadRecord]]:
        """An answer to each question."""
        return answer(model, source, rows, self.config.generate, stopped=stopped)

    def example(self, source: Source, prediction: Answer) -> Example:
        """An answered question, with the annotators' answers, the commonest first."""
        own = [text for text, _ in Counter(prediction.references).most_common()]
        return Example(
            self.thumbnail(source, prediction.row),
            own,
            [(prediction.answer, prediction.probability)],
            f"{prediction.question} · {prediction.image_id}",
        )


def build(run: Run) -> VqaEvaluation:
    """Scores of answers, and answers to a file of questions."""
    return VqaEvaluation(run)
