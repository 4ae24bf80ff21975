"""What was made last, kept; older things are let go."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

Kept = TypeVar("Kept")


class Recent(Generic[Kept]):
    """What ``make(number)`` gave for the numbers asked for last."""

    def __init__(self, make: Callable[[int], Kept], size: int) -> None:
        self._make, self._size = make, size
        self._kept: dict[int, Kept] = {}

    def __getitem__(self, number: int) -> Kept:
        kept = self._kept.pop(number, None)
        if kept is None:
            kept = self._make(number)
            while len(self._kept) >= self._size:
                self._kept.pop(next(iter(self._kept)))
        self._kept[number] = kept
        return kept
