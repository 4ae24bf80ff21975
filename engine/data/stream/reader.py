"""Which shards a reader goes through in which order, and where in them it is.

A *reader* is one worker process of one rank. All readers together go through the shards in passes:
each pass has an order of its own, and its i-th shard is that of reader i mod the number of readers.
A reader that has done its part of a pass continues with the next, without waiting for the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from engine.data.permutation import Permutation
from engine.data.stream.source import WHOLE_SHARD, Item
from engine.errors import FaultError

ReadShard = Callable[[int], Iterator[Item]]
Remaining = dict[str, list[int]]
"""Pass (as text, for JSON) → its shards in order, where these are not all of them."""


@dataclass(frozen=True)
class Order:
    """The passes over ``num_shards`` shards for ``num_readers`` readers.

    ``left`` holds what earlier readers, of another number, have left of the passes that they were
    in. Otherwise a pure function of ``seed``.
    """

    num_shards: int
    num_readers: int
    seed: int
    left: Remaining = field(default_factory=dict)

    def shards(self, number: int, reader: int) -> list[int]:
        """The shards of pass ``number`` for one reader, in order."""
        left = self.left.get(str(number))
        if left is not None:
            return left[reader :: self.num_readers]
        places = np.arange(reader, self.num_shards, self.num_readers)
        order: list[int] = Permutation(self.num_shards, self.seed, number)(places).tolist()
        return order

    def remaining(self, cursors: list[Cursor]) -> Remaining:
        """What all readers have left, each at its cursor, for readers of another number.

        A shard that was not read to its end is left whole.
        """
        first, last = (pick(cursor.number for cursor in cursors) for pick in (min, max))
        left = {}
        for number in range(first, last + 1):
            columns = []
            for reader, cursor in enumerate(cursors):
                mine = self.shards(number, reader)
                done = cursor.shard if cursor.number == number else 0
                columns.append([] if cursor.number > number else mine[done:])
            left[str(number)] = [shard for column in columns for shard in column]
        return {**{n: s for n, s in self.left.items() if int(n) > last}, **left}


class Cursor(NamedTuple):
    """The sample that a reader reads next."""

    number: int = 0  # pass
    shard: int = 0  # among the reader's shards of the pass
    sample: int = 0  # in the shard


class Taken(NamedTuple):
    """A sample of a reader, or what is wrong with a shard."""

    number: int  # pass
    shard: int  # among all shards
    item: Item


class ShardReader:
    """One reader's samples without an end, shuffled in windows; continues anywhere.

    Samples come in the order of the shards, but shuffled within windows of ``window`` samples of
    one pass. While a window is given out, the next one is read. To continue where it was, a reader
    opens the shard in which its window began, skips what came before, and reads it again.
    """

    def __init__(self, order: Order, reader: int, window: int, read_shard: ReadShard) -> None:
        self._order, self._reader = order, reader
        self._window, self._read_shard = window, read_shard
        self._begin, self._given = Cursor(), 0  # of the window, and how many of it were given out
        self._running: Iterator[Taken] | None = None
        self._held: tuple[Cursor, Taken] | None = None  # read, but of the pass after the window's

    def state(self) -> dict[str, Any]:
        """JSON from which ``restore`` continues after the sample given last."""
        return {"begin": list(self._begin), "given": self._given}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue where ``state`` was taken; nothing is read before it is asked for."""
        self._begin, self._given = Cursor(*state["begin"]), state["given"]
        self._running = self._held = None

    def __iter__(self) -> ShardReader:
        return self

    def __next__(self) -> Taken:
        if self._running is None:
            self._running = self._run()
        return next(self._running)

    def _run(self) -> Iterator[Taken]:
        unshuffled = self._unshuffled(self._begin)
        skip = self._given
        window: list[tuple[Cursor, Taken]] = []
        while True:
            self._fill(window, self._window, unshuffled)
            begin, ahead = window[0][0], list[tuple[Cursor, Taken]]()
            order = Permutation(len(window), self._order.seed, self._reader, *begin)
            for given, place in enumerate(order(np.arange(len(window))).tolist(), 1):
                taken = window[place][1]
                if given > skip:
                    self._begin, self._given = begin, given
                    yield taken
                window[place] = window[0]  # lets go of its bytes
                self._fill(ahead, min(given, self._window), unshuffled)
            window, skip = ahead, 0

    def _fill(
        self,
        window: list[tuple[Cursor, Taken]],
        size: int,
        unshuffled: Iterator[tuple[Cursor, Taken]],
    ) -> None:
        """Add to ``window`` up to ``size``, but nothing of another pass than it holds."""
        while len(window) < size:
            held = self._held or next(unshuffled)
            if window and window[0][0].number != held[0].number:
                self._held = held
                return
            self._held = None
            window.append(held)

    def _unshuffled(self, start: Cursor) -> Iterator[tuple[Cursor, Taken]]:
        number = start.number
        while True:
            found, last = start.sample > 0 or start.shard > 0, None
            shards = self._order.shards(number, self._reader)
            for place in range(start.shard, len(shards)):
                first = start.sample if place == start.shard else 0
                for count, item in enumerate(self._read_shard(shards[place])):
                    found = found or item.number != WHOLE_SHARD
                    last = item.bad
                    if count >= first:
                        yield Cursor(number, place, count), Taken(number, shards[place], item)
            if shards and not found:
                raise FaultError(f"none of a reader's {len(shards)} shards has a sample: {last}")
            number, start = number + 1, Cursor()
