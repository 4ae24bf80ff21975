"""Which shards a reader goes through in which order, and where in them it is.

A *reader* is one worker process of one rank. All readers together go through the shards in passes:
each pass has an order of its own, and its i-th shard is that of reader i mod the number of readers.
A reader that has done its part of a pass continues with the next, without waiting for the others.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any, NamedTuple

import numpy as np

from engine.data.permutation import Permutation
from engine.data.stream.source import WHOLE_SHARD, Item
from engine.errors import FaultError

ReadShard = Callable[[int], Iterator[Item]]
Remaining = dict[str, list[int]]
"""Pass (as text, for JSON) → its shards in order, where these are not all of them."""


class Cursor(NamedTuple):
    """The place of a sample among a reader's."""

    number: int = 0  # pass
    shard: int = 0  # among the reader's shards of the pass
    sample: int = 0  # in the shard


class Taken(NamedTuple):
    """A sample of a reader, or what is wrong with a shard."""

    at: Cursor
    shard: int  # among all shards
    item: Item


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
        left = {number: shards for number, shards in self.left.items() if int(number) > last}
        for number in range(first, last + 1):
            left[str(number)] = [
                shard
                for reader, at in enumerate(cursors)
                if at.number <= number
                for shard in self.shards(number, reader)[at.shard if at.number == number else 0 :]
            ]
        return left


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

    def state(self) -> dict[str, Any]:
        """JSON from which ``restore`` continues after the sample given last."""
        return {"begin": list(self._begin), "given": self._given}

    def restore(self, state: dict[str, Any]) -> None:
        """Have the next iteration continue where ``state`` was taken."""
        self._begin, self._given = Cursor(*state["begin"]), state["given"]

    def __iter__(self) -> Iterator[Taken]:
        windows, skip = self._windows(self._begin), self._given
        window = list(next(windows))
        while True:
            begin, ahead = window[0].at, list[Taken]()
            coming = chain.from_iterable(islice(windows, 1))
            order = Permutation(len(window), self._order.seed, self._reader, *begin)
            for given, place in enumerate(order(np.arange(len(window))).tolist(), 1):
                taken = window[place]
                if given > skip:
                    self._begin, self._given = begin, given
                    yield taken
                window[place] = window[0]  # lets go of its bytes
                ahead += islice(coming, 1)
            window, skip = [*ahead, *coming], 0

    def _windows(self, start: Cursor) -> Iterator[Iterator[Taken]]:
        """Each is read as it is iterated over, to its end before the next one."""
        while True:
            samples = self._unshuffled(start)
            for first in samples:
                yield chain([first], islice(samples, self._window - 1))
            start = Cursor(start.number + 1)

    def _unshuffled(self, start: Cursor) -> Iterator[Taken]:
        """What is left of a pass. Raises FaultError where a whole pass has nothing."""
        found, last = start.sample > 0 or start.shard > 0, None
        shards = self._order.shards(start.number, self._reader)
        for place in range(start.shard, len(shards)):
            first = start.sample if place == start.shard else 0
            for count, item in enumerate(self._read_shard(shards[place])):
                found = found or item.number != WHOLE_SHARD
                last = item.bad
                if count >= first:
                    yield Taken(Cursor(start.number, place, count), shards[place], item)
        if shards and not found:
            raise FaultError(f"none of a reader's {len(shards)} shards has a sample: {last}")
