"""Views: a dataset's rows chosen, repeated or put together otherwise than its files have them.

    Subset        a fixed random choice of the rows
    Repeated      every row several times an epoch
    Concatenated  several datasets as one (torch's ConcatDataset)

and, in engine/data/views/images.py, a row for each image. A view holds nothing that grows with the
number of rows: where a row of it lies is computed.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate, chain
from typing import Any, NamedTuple

import numpy as np

from engine.data.permutation import Indices, Permutation
from engine.data.views.caption_order import BLOCK
from engine.types import Row, Source


class Draw(NamedTuple):
    """What a row's random choices hang on: the run's seed, and how often it was shown before."""

    seed: int
    times: int


Place = tuple[Source, int, Draw | None]
_MEANT_ALIKE = ("label", "length", "answer_length")  # columns, in all parts


class View(Source):
    """Rows of ``source`` in another order or number; a row of it is one of ``source``'s."""

    def __init__(self, source: Source, length: int) -> None:
        self.source, self._length = source, length
        self.name, self.split, self.classes = source.name, source.split, source.classes

    def __len__(self) -> int:
        return self._length

    def at(self, index: int, draw: Draw | None) -> Place:
        """Where a row lies one level down. Raises IndexError outside ``range(len(self))``."""
        if not 0 <= index < self._length:
            raise IndexError(f"row {index} of {self._length} of {self.name}")
        return self._at(index, draw)

    def _at(self, index: int, draw: Draw | None) -> Place:
        raise NotImplementedError

    def __getitem__(self, index: int) -> Row:
        """The row at ``index``, of several captions the first; raises BadSample."""
        source, row = origin(self, index)
        return source[row]

    def column(self, name: str) -> np.ndarray:
        """int64 codes of all rows, equal where the values are."""
        raise NotImplementedError

    def captions(self) -> Iterator[str]:
        """All captions in order, without their images."""
        raise NotImplementedError

    @property
    def below(self) -> Sequence[Source]:
        return (self.source,)


def origin(source: Source, row: int, draw: Draw | None = None) -> tuple[Source, int]:
    """The dataset that a row comes from, and its number there. Raises IndexError."""
    while isinstance(source, View):
        source, row, draw = source.at(row, draw)
    return source, row


class Subset(View):
    """A random choice of ``size`` rows, the same for the same seed and number of rows."""

    def __init__(self, source: Source, size: int, seed: int) -> None:
        super().__init__(source, size)
        self._chosen = Permutation(len(source), seed, 4)  # a run's orders are drawn otherwise

    def _at(self, index: int, draw: Draw | None) -> Place:
        return self.source, self._chosen.at(index), draw

    def column(self, name: str) -> np.ndarray:
        return np.asarray(self.source.column(name))[self._chosen(np.arange(len(self)))]

    def captions(self) -> Iterator[str]:
        chosen = (
            self._chosen(np.arange(start, min(start + BLOCK, len(self))))
            for start in range(0, len(self), BLOCK)
        )
        return chain.from_iterable(map(self.source.captions_of, chosen))


class Repeated(View):
    """Every row ``times`` times an epoch, each time with an augmentation of its own; where images
    have several captions, with the next of them."""

    def __init__(self, source: Source, times: int) -> None:
        super().__init__(source, len(source) * times)
        self.times = times

    def _at(self, index: int, draw: Draw | None) -> Place:
        time, row = divmod(index, len(self.source))
        if draw is not None:
            draw = draw._replace(times=draw.times * self.times + time)
        return self.source, row, draw

    @property
    def blocks(self) -> Indices | None:
        own = self.source.blocks
        return None if own is None else np.tile(own, self.times)

    def column(self, name: str) -> np.ndarray:
        return np.tile(self.source.column(name), self.times)

    def captions(self) -> Iterator[str]:
        return chain.from_iterable(self.source.captions() for _ in range(self.times))


class Concatenated(View):
    """Several datasets counted as one, end to end. Equal ids of different parts stay different."""

    def __init__(self, name: str, parts: Sequence[Source]) -> None:
        super().__init__(parts[0], sum(map(len, parts)))
        self.name, self.parts = name, tuple(parts)
        self._ends = list(accumulate(map(len, parts)))

    @property
    def below(self) -> Sequence[Source]:
        return self.parts

    def _at(self, index: int, draw: Draw | None) -> Place:
        part = bisect_right(self._ends, index)
        return self.parts[part], index - (self._ends[part - 1] if part else 0), draw

    @property
    def blocks(self) -> Indices | None:
        own: list[Any] = [part.blocks for part in self.parts]
        return None if any(each is None for each in own) else np.concatenate(own)

    def column(self, name: str) -> np.ndarray:
        codes, used = [], 0
        for part in self.parts:
            own = np.asarray(part.column(name))
            codes.append(own if name in _MEANT_ALIKE else np.where(own < 0, own, own + used))
            used += int(own.max(initial=-1)) + 1
        return np.concatenate(codes)

    def captions(self) -> Iterator[str]:
        return chain.from_iterable(part.captions() for part in self.parts)
