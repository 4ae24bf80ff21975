"""Scores of labels against hand-computed cases and loops."""

from __future__ import annotations

import numpy as np
import pytest

from engine.metrics import recognition
from engine.metrics.recognition import average_precision, curve, exact, semantic

PREDICTED = [["dog", "Cat", "car"], ["dogs"], []]
TRUE = [["cat", "tree"], ["dog"], ["bird"]]


def test_exact_scores_by_hand() -> None:
    # image 1 at k = 2: {dog, cat} against {cat, tree}; image 2: dogs is not dog; image 3: nothing
    assert exact(PREDICTED, TRUE, 2) == pytest.approx((1 / 6, 1 / 6, 1 / 6))
    assert exact(PREDICTED, TRUE, 3) == pytest.approx((1 / 9, 1 / 6, 0.4 / 3))
    assert exact(PREDICTED, TRUE, 1) == (0, 0, 0)
    by_lemma = exact(PREDICTED, TRUE, 2, same=lambda label: label.lower().rstrip("s"))
    assert by_lemma == pytest.approx((0.5, 0.5, 0.5))
    # two predictions that are the same count once
    assert exact([["dog", "DOG"]], [["dog"]], 2) == (1, 1, 1)


def test_semantic_scores_are_means_of_maxima() -> None:
    matrix = np.array([[0.9, 0.2, 0.8], [0.1, 0.5, 0.3]])  # true × predicted
    recall, precision = (0.9 + 0.5) / 2, (0.9 + 0.5 + 0.8) / 3
    f1 = 2 * precision * recall / (precision + recall)
    assert semantic([matrix], 10) == pytest.approx((precision, recall, f1))
    assert semantic([matrix], 1) == pytest.approx((0.9, (0.9 + 0.1) / 2, 2 * 0.9 * 0.5 / 1.4))
    # the mean of F1 is not the F1 of means
    both = semantic([matrix, np.array([[0.2]])], 10)
    assert both == pytest.approx(((precision + 0.2) / 2, (recall + 0.2) / 2, (f1 + 0.2) / 2))
    assert semantic([np.zeros((2, 0))], 3) == (0, 0, 0)
    assert semantic([np.array([[-0.4]])], 1).f1 == 0
    # precision 0.21, recall −0.19: their harmonic mean would be −4
    assert semantic([np.array([[0.21], [-0.59]])], 1) == pytest.approx((0.21, -0.19, 0))


def slow_average_precision(scores, is_true) -> float:
    """At each threshold that any score sets, from the highest down."""
    total, found, before = sum(is_true), 0.0, 0.0
    for threshold in sorted(set(scores), reverse=True):
        chosen = [t for s, t in zip(scores, is_true, strict=True) if s >= threshold]
        recall, precision = sum(chosen) / total, sum(chosen) / len(chosen)
        found += (recall - before) * precision
        before = recall
    return found


def drawn_cases():
    rng = np.random.default_rng(0)
    for case in range(20):
        scores = rng.integers(0, 4 + case, 15) / 7  # with ties
        is_true = rng.random(15) < 0.3
        is_true[case % 15] = True
        yield scores, is_true


def test_average_precision_equals_a_loop() -> None:
    for scores, is_true in drawn_cases():
        want = slow_average_precision(scores.tolist(), is_true.tolist())
        assert average_precision(scores, is_true) == pytest.approx(want)


def test_average_precision_equals_scikit_learns() -> None:
    peer = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")
    for scores, is_true in drawn_cases():
        want = peer.average_precision_score(is_true, scores)
        assert average_precision(scores, is_true) == pytest.approx(want)


def test_classes_that_no_image_has_are_left_out_of_the_mean() -> None:
    scores = np.array([[0.9, 0.1, 0.5], [0.2, 0.8, 0.4]])
    is_true = np.array([[True, False, False], [False, False, True]])
    # the first class is perfect; the third has its image second; the middle one is nobody's
    assert recognition.mean_average_precision(scores, is_true) == pytest.approx((1 + 0.5) / 2)
    assert np.isnan(recognition.mean_average_precision(scores, np.zeros((2, 3), dtype=bool)))


def test_a_curve_goes_down_the_predictions_of_all_images() -> None:
    predicted = [[("cat", 0.9), ("dog", 0.4)], [("Dog", 0.6), ("car", 0.6)], []]
    found = curve(predicted, [["cat"], ["dog"], ["bird", "bird"]])
    # thresholds 0.9, 0.6 (two of them) and 0.4; three labels are true
    assert found.precision.tolist() == pytest.approx([1, 2 / 3, 2 / 4])
    assert found.recall.tolist() == pytest.approx([1 / 3, 2 / 3, 2 / 3])
    # an image's label that is written twice is told once, and recall is 1 at most
    again = curve([[("dog", 0.9), ("Dog", 0.4)]], [["DOG", "dog"]])
    assert (again.precision.tolist(), again.recall.tolist()) == ([1], [1])
    assert not curve([[]], [["cat"]]).precision.size
