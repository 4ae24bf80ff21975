"""A pseudo-random order of any number of rows, computed instead of stored.

The permutation of ``range(n)`` is an alternating Feistel network on the smallest power of two that
holds n, walked along its cycles until the value falls below n (Black and Rogaway, "Ciphers with
arbitrary finite domains", 2002). Any position is evaluated by itself, so memory does not depend on
n, and a run resumes at any position at once.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]

_MASK_64: Final = (1 << 64) - 1
_ROUNDS: Final = (16, 8)  # below and from 4,096 rows: halves of a few bits mix more slowly
_MULTIPLIERS: Final = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))  # splitmix64


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
        self._low_bits = np.uint64(bits // 2)
        self._low_mask = np.uint64((1 << bits // 2) - 1)
        self._high_mask = np.uint64((1 << (bits - bits // 2)) - 1)
        self._keys = [np.uint64(hash64(*seed, n, number)) for number in range(_ROUNDS[bits >= 12])]
        # The same as Python's integers, which are quicker one at a time.
        self._plain = (
            int(self._low_bits),
            int(self._low_mask),
            int(self._high_mask),
            [int(key) for key in self._keys],
        )

    def __call__(self, positions: Indices) -> Indices:
        """The rows at ``positions`` (any shape). Raises IndexError for one outside ``range(n)``."""
        positions = np.asarray(positions, dtype=np.int64)
        if positions.size and (positions.min() < 0 or positions.max() >= self.n):
            raise IndexError(f"a position is outside range({self.n})")
        rows = self._encrypt(positions.astype(np.uint64).ravel())
        limit = np.uint64(self.n)
        outside = np.flatnonzero(rows >= limit)
        while outside.size:  # at most half of the domain is outside, so this ends soon
            rows[outside] = self._encrypt(rows[outside])
            outside = outside[rows[outside] >= limit]
        return rows.astype(np.int64).reshape(positions.shape)

    def at(self, position: int) -> int:
        """The row at one position: the same as ``self([position])[0]``, at a tenth of its time.

        Raises IndexError for a position outside ``range(n)``.
        """
        if not 0 <= position < self.n:
            raise IndexError(f"position {position} is outside range({self.n})")
        low_bits, low_mask, high_mask, keys = self._plain
        row = position
        while True:
            low, high = row & low_mask, row >> low_bits
            for number in range(0, len(keys), 2):
                low ^= _mix(high ^ keys[number]) & low_mask
                high ^= _mix(low ^ keys[number + 1]) & high_mask
            row = high << low_bits | low
            if row < self.n:
                return row

    def _encrypt(self, values: NDArray[np.uint64]) -> NDArray[np.uint64]:
        low, high = values & self._low_mask, values >> self._low_bits
        for number in range(0, len(self._keys), 2):
            low ^= self._mix(high, self._keys[number]) & self._low_mask
            high ^= self._mix(low, self._keys[number + 1]) & self._high_mask
        return (high << self._low_bits) | low

    @staticmethod
    def _mix(half: NDArray[np.uint64], key: np.uint64) -> NDArray[np.uint64]:
        mixed = half ^ key  # the key reaches every bit of the product, unlike an added one
        mixed *= _MULTIPLIERS[0]
        mixed ^= mixed >> np.uint64(29)
        mixed *= _MULTIPLIERS[1]
        mixed >>= np.uint64(32)
        return mixed


def _mix(value: int) -> int:
    """``Permutation._mix`` of one value, the key already in it."""
    value = value * int(_MULTIPLIERS[0]) & _MASK_64
    value ^= value >> 29
    return (value * int(_MULTIPLIERS[1]) & _MASK_64) >> 32
