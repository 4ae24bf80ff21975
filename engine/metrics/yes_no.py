"""Answers of yes and no: accuracy, and precision, recall and F1 of yes, in percent.

The figures and the reading of answers are those of POPE (Li et al. 2023), but for capital letters.
"""

from __future__ import annotations

from collections.abc import Sequence

_NO = {"no", "not"}


def read(answer: str) -> bool:
    """Whether an answer means yes: in its first sentence stands neither "no" nor "not"."""
    return not _NO & _words(answer)


def is_clear(answer: str) -> bool:
    """Whether an answer says yes, no or not at all; others count as yes."""
    return bool((_NO | {"yes"}) & _words(answer))


def _words(answer: str) -> set[str]:
    return set(answer.split(".")[0].replace(",", "").lower().split())


def figures(said: Sequence[str | None], labels: Sequence[bool]) -> dict[str, float]:
    """Figures of answers against labels (true is yes); an answer of None is wrong, and not a yes.

    ``yes_share`` is the share of answers that mean yes, ``unclear`` how many say neither yes nor
    no, which POPE's rule counts as yes. Precision is 0 where no answer is yes, recall where no
    label is. Raises ValueError where there is nothing to count.
    """
    if not labels:
        raise ValueError("there are no questions of yes and no to score")
    pairs = [
        (None if answer is None else read(answer), label)
        for answer, label in zip(said, labels, strict=True)
    ]
    num_hits = sum(bool(means and label) for means, label in pairs)
    num_yes, num_labelled = sum(bool(means) for means, _ in pairs), sum(labels)
    both = num_yes + num_labelled
    return {
        "accuracy": 100 * sum(means == label for means, label in pairs) / len(pairs),
        "precision": 100 * num_hits / num_yes if num_yes else 0.0,
        "recall": 100 * num_hits / num_labelled if num_labelled else 0.0,
        "f1": 100 * 2 * num_hits / both if both else 0.0,
        "yes_share": 100 * num_yes / len(pairs),
        "unclear": sum(answer is not None and not is_clear(answer) for answer in said),
        "questions": len(pairs),
    }
