"""Accuracies by hand and against a plain recount."""

import numpy as np
import pytest
import torch

from engine.metrics import classification


def accuracy(score, label):
    return classification.from_ranks(classification.label_ranks(score, label), label)


def test_by_hand():
    score = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [1.0, 5.0, 2.0], [0.0, 0.0, 1.0]])
    label = torch.tensor([0, 1, 1, 2])
    assert classification.label_ranks(score, label).tolist() == [1, 2, 1, 1]
    values = accuracy(score, label)
    assert values["accuracy@1"] == 75.0
    assert values["accuracy@5"] == 100.0  # fewer classes than five
    assert values["mean_per_class_accuracy"] == pytest.approx(100 * (1 + 0.5 + 1) / 3)


def test_equals_a_recount_on_random_scores():
    generator = np.random.default_rng(0)
    score, label = generator.normal(size=(200, 12)), generator.integers(0, 12, 200)
    order = np.argsort(-score, axis=1)
    for k in (1, 5):
        expected = 100 * np.mean([y in row[:k] for y, row in zip(label, order, strict=True)])
        values = accuracy(torch.tensor(score), torch.tensor(label))
        assert values[f"accuracy@{k}"] == pytest.approx(expected)
    per_class = [np.mean(order[label == c, 0] == c) for c in range(12)]
    assert values["mean_per_class_accuracy"] == pytest.approx(100 * np.mean(per_class))


def test_ties_count_against_the_model():
    values = accuracy(torch.zeros(4, 10), torch.arange(4))
    assert values["accuracy@1"] == values["accuracy@5"] == 0.0


def test_classes_that_do_not_occur_are_left_out_of_the_mean():
    values = accuracy(torch.eye(10)[:3], torch.tensor([0, 1, 5]))
    assert values["mean_per_class_accuracy"] == pytest.approx(100 * 2 / 3)


def test_faults_are_named():
    with pytest.raises(ValueError, match="row 1 has label 7, but classes are 3"):
        accuracy(torch.zeros(2, 3), torch.tensor([0, 7]))
    with pytest.raises(ValueError, match="NaN, the first in row 1"):
        accuracy(torch.tensor([[0.0], [torch.nan]]), torch.tensor([0, 0]))
    with pytest.raises(ValueError, match="at least one"):
        accuracy(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))
