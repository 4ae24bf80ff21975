"""Agreement statistics against loops over all pairs, and by hand."""

import itertools
import time

import numpy as np
import pytest

from engine.metrics import agreement
from engine.metrics.agreement import (
    kendall_tau_b,
    pairwise_accuracy,
    pearson,
    positive_over_negative,
    winoground,
)

CASES = [
    (2, 2, 2, 0), (3, 5, 3, 1), (7, 3, 2, 2), (30, 4, 40, 3), (36, 1000, 5, 4), (128, 7, 7, 5),
]  # fmt: skip


def drawn(items, scores, humans, seed):
    """Whole numbers with few and many ties, shifted below zero."""
    generator = np.random.default_rng(seed)
    human = generator.integers(0, humans, items) / 2
    return generator.integers(0, scores, items) / 8 - 1 + human * (seed % 2), human


def tau_by_loop(x, y):
    agree = free_x = free_y = 0
    for i, j in itertools.combinations(range(len(x)), 2):
        a, b = np.sign(x[i] - x[j]), np.sign(y[i] - y[j])
        agree, free_x, free_y = agree + a * b, free_x + (a != 0), free_y + (b != 0)
    return agree / np.sqrt(free_x * free_y) if free_x and free_y else np.nan


def accuracy_by_loop(x, y, epsilon, groups):
    shares = []
    for group in sorted(set(groups)):
        right = [
            (abs(x[i] - x[j]) <= epsilon if y[i] == y[j]
             else abs(x[i] - x[j]) > epsilon and (x[i] > x[j]) == (y[i] > y[j]))
            for i, j in itertools.combinations(range(len(x)), 2)
            if groups[i] == groups[j] == group
        ]  # fmt: skip
        shares += [np.mean(right)] if right else []
    return np.mean(shares)


@pytest.mark.parametrize("case", CASES)
def test_correlations_equal_loops(case):
    x, y = drawn(*case)
    assert kendall_tau_b(x, y) == pytest.approx(tau_by_loop(x, y), abs=1e-12, nan_ok=True)
    with np.errstate(all="ignore"):
        wanted = np.corrcoef(x, y)[0, 1]
    assert pearson(x, y) == pytest.approx(wanted, abs=1e-12, nan_ok=True)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("num_groups", [0, 1, 3])
def test_pairwise_accuracy_is_the_best_over_all_limits(case, num_groups):
    x, y = drawn(*case)
    generator = np.random.default_rng(9)
    groups = generator.integers(0, num_groups, len(x)).tolist() if num_groups else None
    if groups and max(map(groups.count, groups)) < 2:
        with pytest.raises(ValueError, match="no pair"):
            pairwise_accuracy(x, y, groups)
        return
    same = groups or [0] * len(x)
    gaps = {abs(a - b) for a, b in itertools.combinations(x, 2)} | {0.0}
    by_limit = {limit: accuracy_by_loop(x, y, limit, same) for limit in sorted(gaps)}
    found = pairwise_accuracy(x, y, groups)
    best = max(by_limit.values())
    assert found["pairwise_accuracy"] == pytest.approx(best, abs=1e-12)
    assert by_limit[found["tie_epsilon"]] == pytest.approx(best, abs=1e-12)
    assert found["pairwise_accuracy_without_ties"] == pytest.approx(by_limit[0.0], abs=1e-12)
    if not num_groups:  # several groups' shares may round apart where limits are equally good
        assert found["tie_epsilon"] == min(e for e, share in by_limit.items() if share == best)
        assert (found["pairs_compared"], found["pairs_drawn"]) == (
            len(x) * (len(x) - 1) // 2,
            False,
        )


def test_perfect_opposite_and_constant():
    x = np.arange(5.0)
    for same in (pearson, kendall_tau_b):
        assert same(x, x) == pytest.approx(1)
        assert same(x, -x) == pytest.approx(-1)
        assert np.isnan(same(x, np.ones(5)))
        assert np.isnan(same([], []))
    assert pearson(x * 1e200, x * 1e-200) == pytest.approx(1)
    assert pairwise_accuracy(x, x)["pairwise_accuracy"] == 1
    assert pairwise_accuracy(x, np.ones(5))["tie_epsilon"] == 4  # people tie all, so all are ties
    assert pairwise_accuracy(x, np.ones(5))["pairwise_accuracy_without_ties"] == 0


def test_many_items_take_seconds_and_draw_their_pairs(monkeypatch):
    monkeypatch.setattr(agreement, "MAX_PAIRS", 200_000)
    generator = np.random.default_rng(0)
    human = generator.integers(0, 5, 200_000).astype(float)
    score = human + generator.normal(size=len(human))
    start = time.process_time()
    tau = kendall_tau_b(score, human)
    found = pairwise_accuracy(score, human)
    assert time.process_time() - start < 10
    assert (found["pairs_compared"], found["pairs_drawn"]) == (200_000, True)
    monkeypatch.undo()
    few = pairwise_accuracy(score[:1000], human[:1000])
    assert found["pairwise_accuracy"] == pytest.approx(few["pairwise_accuracy"], abs=0.02)
    assert tau == pytest.approx(kendall_tau_b(score[:2000], human[:2000]), abs=0.03)


def test_winoground_by_hand():
    right = [[2, 0], [1, 2]]
    text_alone = [[3, 2], [4, 5]]  # image 1 likes both captions better than image 0 does
    image_alone = [[3, 4], [2, 5]]  # both images like caption 1 better
    tie = [[1, 1], [1, 1]]
    assert winoground([right]) == {"text": 100, "image": 100, "group": 100}
    assert winoground([text_alone]) == {"text": 100, "image": 0, "group": 0}
    assert winoground([image_alone]) == {"text": 0, "image": 100, "group": 0}
    assert winoground([right, text_alone, image_alone, tie]) == {
        "text": 50, "image": 50, "group": 25,
    }  # fmt: skip


def test_right_over_wrong_by_hand():
    found = positive_over_negative([1, 2, 3, 3], [0, 2, 1, 4], ["a", "a", "a", "b"])
    assert found == pytest.approx({"overall": 50, "mean": 100 / 3, "a": 200 / 3, "b": 0})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pearson([1, 2], [1]), "one length"),
        (lambda: kendall_tau_b([1, np.nan], [1, 2]), r"first that is not is \[1\]"),
        (lambda: pairwise_accuracy([1, np.inf], [1, 2]), "not all finite"),
        (lambda: pairwise_accuracy([1, 2], [1, 2], ["a"]), "2 items, but 1 groups"),
        (lambda: pairwise_accuracy([1], [1]), "no pair"),
        (lambda: winoground(np.zeros((0, 2, 2))), "Winoground takes"),
        (lambda: winoground(np.zeros((1, 2, 3))), "Winoground takes"),
        (lambda: positive_over_negative([1, 2], [1, 2], ["a"]), "2 items, but 1 kinds"),
    ],
)
def test_what_cannot_be_scored(call, message):
    with pytest.raises(ValueError, match=message):
        call()
