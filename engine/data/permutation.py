"""A pseudo-random order of any number of rows, computed instead of stored.

The permutation of ``range(n)`` is an alternating Feistel network on the smallest power of two that
holds n, walked along its cycles until the value falls below n (Black and Rogaway, "Ciphers with
arbitrary finite domains", 2002). Any position is evaluated by itself, so memory does not depend on
n, and a run resumes at any position at once.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]

_MASK_64 = (1 << 64) - 1
_ROUNDS = (16, 8)  # below and from 4,096 rows: halves of a few bits mix more slowly


def hash64(*parts: int) -> int:
    """64 well-mixed bits of a sequence of integers (splitmix64, Steele et al. 2014)."""
    state = len(parts)
    for part in parts:
        state = (state ^ (part & _MASK_64)) + 0x9E3779B97F4A7C15 & _MASK_64
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & _MASK_64
        state = (state ^ state >> 27) * 0x94D049BB133111EB & _MASK_64
        state ^= state >> 31
    return state


class Permutation:
    """A permutation of ``range(n)`` that is a pure function of the integers in ``seed``."""

    def __init__(self, n: int, *seed: int) -> None:
        if not 0 <= n <= 1 << 62:
            raise ValueError(f"a permutation of {n} rows is not supported")
        self.n = n
        bits = max(2, (n - 1).bit_length())
        self._low_bits = bits // 2
        self._low_mask = (1 << bits // 2) - 1
        self._high_mask = (1 << (bits - bits // 2)) - 1
        self._keys = [hash64(*seed, n, number) for number in range(_ROUNDS[bits >= 12])]

    def __call__(self, positions: Indices) -> Indices:
        """The rows at ``positions`` (any shape). Raises IndexError for one outside ``range(n)``."""
        positions = np.asarray(positions, dtype=np.int64)
        if positions.size and (positions.min() < 0 or positions.max() >= self.n):
            raise IndexError(f"a position is outside range({self.n})")
        rows = self._encrypt(positions.astype(np.uint64).ravel())
        outside = np.flatnonzero(rows >= self.n)
        while outside.size:  # at most half of the domain is outside, so this ends soon
            rows[outside] = self._encrypt(rows[outside])
            outside = outside[rows[outside] >= self.n]
        return rows.astype(np.int64).reshape(positions.shape)

    def at(self, position: int) -> int:
        """The row at one position: the same as ``self([position])[0]``, at a tenth of its time.

        Raises IndexError for a position outside ``range(n)``.
        """
        if not 0 <= position < self.n:
            raise IndexError(f"position {position} is outside range({self.n})")
        row = self._encrypt(position)
        while row >= self.n:
            row = self._encrypt(row)
        return row

    def _encrypt(self, values: Any) -> Any:
        """One walk through the network, of an integer or of many as uint64."""
        low, high = values & self._low_mask, values >> self._low_bits
        for number in range(0, len(self._keys), 2):
            low ^= _mix(high ^ self._keys[number]) & self._low_mask
            high ^= _mix(low ^ self._keys[number + 1]) & self._high_mask
        return high << self._low_bits | low


def _mix(keyed: Any) -> Any:
    """Splitmix64's mixing; a key reaches every bit of the product, unlike an added one."""
    keyed *= 0xBF58476D1CE4E5B9
    keyed &= _MASK_64
    keyed ^= keyed >> 29
    keyed *= 0x94D049BB133111EB
    keyed &= _MASK_64
    keyed >>= 32
    return keyed
