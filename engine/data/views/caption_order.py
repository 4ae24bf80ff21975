"""Captions of rows in any order, though a dataset lists them in its own.

Reading a row for its caption would read its image too where those lie in shards or tables.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

import numpy as np

from engine.data.permutation import Indices
from engine.types import Source

BLOCK = 1 << 18  # captions in memory at once


def in_blocks(rows: Indices) -> Iterator[Indices]:
    """``rows`` in pieces of ``BLOCK``."""
    return (rows[start : start + BLOCK] for start in range(0, len(rows), BLOCK))


def captions_at(source: Source, rows: Iterable[Indices]) -> Iterator[str]:
    """The captions of blocks of rows in the order given, a block in memory at a time.

    Passes through ``source.captions()`` once where the blocks ascend, else once a block.
    """
    captions: Iterator[str] = iter(())
    position = len(source)
    for block in rows:
        held: dict[int, str] = {}
        for row in np.unique(block).tolist():
            if row < position:
                captions, position = source.captions(), 0
            held[row] = next(islice(captions, row - position, None))
            position = row + 1
        yield from map(held.__getitem__, block.tolist())
