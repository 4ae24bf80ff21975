"""The computed permutation: a bijection, well mixed, of any size, in memory that does not grow."""

import itertools
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data.permutation import Permutation, hash64


@settings(max_examples=60, deadline=None)
@given(n=st.integers(0, 5000), seed=st.integers(0, 2**64 - 1))
def test_is_a_bijection(n, seed):
    rows = Permutation(n, seed)(np.arange(n))
    assert np.array_equal(np.sort(rows), np.arange(n))


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 63, 64, 65, 4095, 4096, 4097, 2**17, 2**17 + 1])
def test_is_a_bijection_around_powers_of_two(n):
    assert np.array_equal(np.sort(Permutation(n, 3)(np.arange(n))), np.arange(n))


@pytest.mark.parametrize("n", [10**6, 10**9, 10**12, 2**40 + 1, 2**50])
def test_large_domains_stay_inside_and_do_not_collide(n):
    positions = np.linspace(0, n - 1, 20_000).astype(np.int64)
    rows = Permutation(n, 11)(np.unique(positions))
    assert rows.min() >= 0
    assert rows.max() < n
    assert len(np.unique(rows)) == len(rows)
    assert abs(rows.mean() / n - 0.5) < 0.01


@given(n=st.integers(1, 10**12), seed=st.integers(0, 2**32), data=st.data())
@settings(max_examples=50, deadline=None)
def test_a_position_has_one_row_however_it_is_asked_for(n, seed, data):
    positions = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=20))
    order = Permutation(n, seed)
    together = order(np.array(positions))
    assert together.tolist() == [int(order(np.array([p]))[0]) for p in positions]
    assert together.tolist() == [order.at(p) for p in positions]
    assert together.tolist() == Permutation(n, seed)(np.array(positions)).tolist()


def test_keeps_the_shape_of_positions():
    order = Permutation(12, 0)
    assert np.array_equal(order(np.arange(12).reshape(3, 4)), order(np.arange(12)).reshape(3, 4))
    assert order(np.array([], dtype=np.int64)).shape == (0,)


@pytest.mark.parametrize("positions", [[-1], [7], [0, 9]])
def test_a_position_outside_raises(positions):
    with pytest.raises(IndexError, match="range"):
        Permutation(7, 0)(np.array(positions))
    with pytest.raises(IndexError, match="range"):
        Permutation(7, 0).at(positions[-1])


def test_too_many_rows_raise():
    with pytest.raises(ValueError, match="not supported"):
        Permutation(2**62 + 1, 0)


@pytest.mark.parametrize("n", [3, 4, 5])
def test_small_permutations_are_all_about_equally_likely(n):
    seeds = 1000
    drawn = [tuple(Permutation(n, seed)(np.arange(n)).tolist()) for seed in range(seeds)]
    every = list(itertools.permutations(range(n)))
    counts = np.array([drawn.count(order) for order in every])
    expected = seeds / len(every)
    chi_square = ((counts - expected) ** 2 / expected).sum()
    freedom = len(every) - 1
    assert chi_square < freedom + 5 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("n", [10, 37])
def test_every_row_is_equally_likely_at_every_place(n):
    seeds = 1000
    counts = np.zeros((n, n))
    for seed in range(seeds):
        counts[np.arange(n), Permutation(n, seed)(np.arange(n))] += 1
    expected = seeds / n
    chi_square = ((counts - expected) ** 2 / expected).sum()
    freedom = (n - 1) ** 2
    assert abs(chi_square - freedom) < 5 * (2 * freedom) ** 0.5


def test_neighbours_and_epochs_are_not_correlated():
    n = 50_000
    first, second = (Permutation(n, 1, epoch)(np.arange(n)) for epoch in (0, 1))
    bound = 4 / n**0.5
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < bound
    assert abs(np.corrcoef(first, np.arange(n))[0, 1]) < bound
    assert abs(np.corrcoef(first, second)[0, 1]) < bound


def test_memory_does_not_depend_on_n():
    def peak(n: int) -> int:
        tracemalloc.start()
        order = Permutation(n, 5)
        for position in range(0, 50):
            order(np.arange(position * 256, position * 256 + 256))
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(10**5)
    small, large = peak(10**5), peak(10**12)
    assert large < 100_000
    assert large < 1.5 * small


def test_hash_mixes_order_length_and_sign():
    drawn = {hash64(), hash64(0), hash64(0, 0), hash64(1, 2), hash64(2, 1), hash64(-1), hash64(1)}
    assert len(drawn) == 7
    assert all(0 <= value < 2**64 for value in drawn)
    bits = np.array([[hash64(7, i) >> bit & 1 for bit in range(64)] for i in range(2000)])
    assert np.all(np.abs(bits.mean(axis=0) - 0.5) < 0.06)
