"""How long the texts of a table's rows are, counted once by Arrow's kernels: 4 bytes a row.

The length of a row is the number of characters of its conversation, or else of its caption (which a
question and its answer make): negative where the row has no image, so that it tells that too. That
of its answer is its last turn's, or else the caption's less the question.
A *pair* is what a human says with the answer that follows; rows without any count as one pair.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from engine.data.permutation import Indices
from engine.data.tables.table import Table

_COLUMNS = ("caption", "turns", "image", "file", "question")


def of_rows(table: Table) -> np.ndarray:
    """int32 [rows], memory-mapped."""
    return table.kept("length", np.int32, len(table), lambda: map(_row_lengths, _batches(table)))


def of_pairs(table: Table) -> np.ndarray:
    """int32 [pairs], memory-mapped: of each pair of each row, one after another."""
    total = int(pair_ends(table)[-1])
    return table.kept("pairs.length", np.int32, total, lambda: map(_pair_lengths, _batches(table)))


def of_answers(table: Table) -> np.ndarray:
    """int32 [rows], memory-mapped."""
    return table.kept(
        "answer.length", np.int32, len(table), lambda: map(_answer_lengths, _batches(table))
    )


def of_pair_answers(table: Table) -> np.ndarray:
    """int32 [pairs], memory-mapped."""
    total = int(pair_ends(table)[-1])
    return table.kept(
        "pairs.answer.length", np.int32, total, lambda: map(_pair_answer_lengths, _batches(table))
    )


def pair_ends(table: Table) -> np.ndarray:
    """int64 [rows], memory-mapped: how many pairs the rows up to each one have, itself included."""

    def ends() -> Iterator[Indices]:
        before = 0
        for batch in _batches(table):
            counts = np.maximum(_Turns(batch).pairs, 1)
            yield np.cumsum(counts) + before
            before += int(counts.sum())

    return table.kept("pairs.ends", np.int64, len(table), ends)


def _batches(table: Table) -> Iterator[pa.RecordBatch]:
    return table.batches([name for name in _COLUMNS if name in table.column_names])


class _Turns:
    """The turns of a batch's rows, laid end to end."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        nothing = np.zeros(0, np.int64)
        self.rows, self.lengths, self.starts = nothing, nothing, nothing
        self.totals = self.counts = np.zeros(batch.num_rows, np.int64)  # of each row
        if "turns" in batch.schema.names and len(lists := batch.column("turns")):
            self.counts = pc.list_value_length(lists).fill_null(0).to_numpy().astype(np.int64)
            turns = pc.list_flatten(lists)
            self.rows = np.repeat(np.arange(batch.num_rows), self.counts)
            self.lengths = pc.utf8_length(pc.struct_field(turns, "text")).to_numpy()
            by_human = pc.equal(pc.struct_field(turns, "role"), "human")
            asks = by_human.to_numpy(zero_copy_only=False)
            same_row = self.rows[1:] == self.rows[:-1]
            self.starts = np.flatnonzero(asks[:-1] & ~asks[1:] & same_row)  # of each pair
            self.totals = np.bincount(self.rows, self.lengths, batch.num_rows).astype(np.int64)
        self.pairs = np.bincount(self.rows[self.starts], minlength=batch.num_rows)  # of each row

    def of_pairs(self, rows: Indices, signs: Indices, pairs: Indices) -> Indices:
        """What holds of each pair: of a row without any, what holds of the row."""
        counts = np.maximum(self.pairs, 1)
        found = np.repeat(rows, counts)
        own = np.repeat(self.pairs > 0, counts)
        found[own] = np.repeat(signs, counts)[own] * pairs
        return found


def _row_lengths(batch: pa.RecordBatch) -> Indices:
    turns = _Turns(batch)
    captions = pc.utf8_length(batch.column("caption")).fill_null(0).to_numpy()
    return _signed(np.where(turns.counts > 0, turns.totals, captions), batch)


def _pair_lengths(batch: pa.RecordBatch) -> Indices:
    turns, rows = _Turns(batch), _row_lengths(batch)
    both = turns.lengths[turns.starts] + turns.lengths[turns.starts + 1]
    return turns.of_pairs(rows, np.sign(rows), both)


def _answer_lengths(batch: pa.RecordBatch) -> Indices:
    turns = _Turns(batch)
    answers = pc.utf8_length(batch.column("caption")).fill_null(0).to_numpy().astype(np.int64)
    if "question" in batch.schema.names:  # which stands before the answer, with a space
        asked = pc.utf8_length(batch.column("question")).fill_null(-1).to_numpy()
        answers = np.maximum(answers - asked - 1, 0)
    last = np.flatnonzero(np.diff(turns.rows, append=-1))  # of each conversation
    answers[turns.rows[last]] = turns.lengths[last]
    return answers


def _pair_answer_lengths(batch: pa.RecordBatch) -> Indices:
    turns = _Turns(batch)
    rows = _answer_lengths(batch)
    return turns.of_pairs(rows, np.ones_like(rows), turns.lengths[turns.starts + 1])


def _signed(lengths: Indices, batch: pa.RecordBatch) -> Indices:
    """Negative without an image: at least one character then, since zero has no sign."""
    shown = [batch.column(name) for name in ("image", "file") if name in batch.schema.names]
    has_image = np.any([c.is_valid().to_numpy(zero_copy_only=False) for c in shown], axis=0)
    return np.where(has_image, np.maximum(lengths, 1), -np.maximum(lengths, 1))


COLUMNS: dict[str, Callable[[Table], np.ndarray]] = {
    "length": of_rows,
    "answer_length": of_answers,
    "pair_ends": pair_ends,
    "pair_length": of_pairs,
    "pair_answer_length": of_pair_answers,
}
