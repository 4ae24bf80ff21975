"""The figure that decides which checkpoint is the best."""

import pytest

from engine.train.best import best_metric, missing

LABELS = {"a/mAP": 7.0, "a/exact_P@2": 5.0, "a/exact_F1@2": 3.0, "b/exact_F1@2": 4.0, "b/is": "x"}


@pytest.mark.parametrize(
    ("metrics", "name", "value"),
    [
        ({"a/R@1": 1.0, "a/RSUM": 2.0, "b/RSUM": 3.0}, None, 2.0),
        ({"a/R@1": 1.0, "a/RSUM": 2.0, "b/RSUM": 3.0}, "b/RSUM", 3.0),
        ({"a/BLEU-4": 1.0, "a/CIDEr": 2.0}, None, 2.0),
        ({"a/majority_accuracy": 9.0, "a/accuracy": 2.0}, None, 2.0),
        ({"a/accuracy@1": 2.0, "a/accuracy@5": 3.0}, None, 2.0),
        (LABELS, None, 3.0),
        (LABELS, "exact_F1@2", 3.0),
        (LABELS, "b/exact_F1@2", 4.0),
        (LABELS, "F1@2", None),
        (LABELS, "b/is", None),
        ({}, "a/RSUM", None),
        ({"a/commonest_exact_F1@1": 1.0}, None, None),
    ],
)
def test_the_figure_is_the_one_named_or_the_usual_one(metrics, name, value):
    assert best_metric(metrics, name) == value


def test_a_name_that_no_figure_has_is_told():
    assert missing(LABELS, "exact_F1@2") is missing(LABELS, None) is missing({}, "x") is None
    told = missing(LABELS, "a/exact_F1@3")
    assert "ckpt.best_metric" in told and "'a/exact_F1@3'" in told and "a/exact_F1@2" in told
