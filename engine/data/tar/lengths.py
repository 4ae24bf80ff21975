"""How long the texts of shards' rows are: what engine/data/tables/lengths.py says of tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pyarrow.compute as pc

from engine.data.permutation import Indices
from engine.data.tar.index import TarIndex
from engine.data.tar.samples import parse_more
from engine.data.views.turns import pairs_of
from engine.types import Turn


def conversations(rows: TarIndex) -> Iterator[tuple[Turn, ...]]:
    """The turns of each row; none of most."""
    for more in rows.batch.column("more").to_pylist():
        yield parse_more(more).turns if more else ()


def has_turns(rows: TarIndex) -> bool:
    """Whether any row is a conversation."""
    return bool(pc.any(pc.match_substring(rows.batch.column("more"), '"turns"')).as_py())


def row_lengths(rows: TarIndex) -> Indices:
    """int32 [rows]: characters, negative without an image."""
    lengths = pc.utf8_length(rows.batch.column("caption")).to_numpy().astype(np.int32)
    for row, turns in enumerate(conversations(rows)):
        if turns:
            lengths[row] = sum(len(text) for _, text in turns)
    has_image = pc.not_equal(rows.batch.column("image"), "").to_numpy(zero_copy_only=False)
    return np.where(has_image, np.maximum(lengths, 1), -np.maximum(lengths, 1))


def answer_lengths(rows: TarIndex) -> Indices:
    """int32 [rows]: characters of the last turn, or of the caption."""
    lengths = pc.utf8_length(rows.batch.column("caption")).to_numpy().astype(np.int32)
    for row, turns in enumerate(conversations(rows)):
        if turns:
            lengths[row] = len(turns[-1][1])
    return lengths


def pair_counts(rows: TarIndex) -> Indices:
    """int64 [rows]: at least 1."""
    counts = (max(1, len(pairs_of(turns))) for turns in conversations(rows))
    return np.fromiter(counts, np.int64, len(rows))


def pair_lengths(rows: TarIndex) -> Indices:
    """int32 [pairs]."""
    lengths: list[int] = []
    for own, turns in zip(row_lengths(rows).tolist(), conversations(rows), strict=True):
        sign = 1 if own > 0 else -1
        pairs = (turns[place : place + 2] for place in pairs_of(turns))
        lengths += [sign * sum(len(text) for _, text in pair) for pair in pairs] or [own]
    return np.array(lengths, np.int32)


def pair_answer_lengths(rows: TarIndex) -> Indices:
    """int32 [pairs]."""
    lengths: list[int] = []
    for own, turns in zip(answer_lengths(rows).tolist(), conversations(rows), strict=True):
        lengths += [len(turns[place + 1][1]) for place in pairs_of(turns)] or [own]
    return np.array(lengths, np.int32)


def _all_rows(count: Callable[[TarIndex], Indices]) -> Callable[[Iterator[TarIndex]], Indices]:
    return lambda shards: np.concatenate(list(map(count, shards)))


COLUMNS: dict[str, Callable[[Iterator[TarIndex]], Indices]] = {
    "length": _all_rows(row_lengths),
    "answer_length": _all_rows(answer_lengths),
    "pair_ends": lambda shards: np.cumsum(_all_rows(pair_counts)(shards)),
    "pair_length": _all_rows(pair_lengths),
    "pair_answer_length": _all_rows(pair_answer_lengths),
}
