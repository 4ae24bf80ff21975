"""How long the texts of a table's rows are, counted once by Arrow's kernels: 4 bytes a row.

The length of a row is the number of characters of its conversation, or else of its caption (which a
question and its answer make): negative where the row has no image, so that it tells that too. That
of its answer is its last turn's, or else the caption's less the question.
A *pair* is what a human says with the answer that follows; rows without any count as one pair.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from engine.data.permutation import Indices


class _Turns:
    """The turns of a batch's rows, end to end."""

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


def _chars(batch: pa.RecordBatch, name: str, without: int) -> Indices:
    if name not in batch.schema.names:
        return np.full(batch.num_rows, without, np.int64)
    return pc.utf8_length(batch.column(name)).fill_null(without).to_numpy().astype(np.int64)


def _of_rows(batch: pa.RecordBatch) -> Indices:
    turns = _Turns(batch)
    lengths = np.where(turns.counts > 0, turns.totals, _chars(batch, "caption", 0))
    has_image = np.zeros(batch.num_rows, bool)
    if "images" in batch.schema.names:
        has_image = pc.list_value_length(batch.column("images")).fill_null(0).to_numpy() > 0
    return np.maximum(lengths, 1) * np.where(has_image, 1, -1)  # zero has no sign


def _of_answers(batch: pa.RecordBatch) -> Indices:
    turns = _Turns(batch)
    answers = _chars(batch, "caption", 0)
    # A question stands before its answer, with a space.
    answers = np.maximum(answers - _chars(batch, "question", -1) - 1, 0)
    last = np.flatnonzero(np.diff(turns.rows, append=-1))  # of each conversation
    answers[turns.rows[last]] = turns.lengths[last]
    return answers


def _of_pairs(batch: pa.RecordBatch) -> Indices:
    turns, rows = _Turns(batch), _of_rows(batch)
    both = turns.lengths[turns.starts] + turns.lengths[turns.starts + 1]
    return turns.of_pairs(rows, np.sign(rows), both)


def _of_pair_answers(batch: pa.RecordBatch) -> Indices:
    turns, rows = _Turns(batch), _of_answers(batch)
    return turns.of_pairs(rows, np.ones_like(rows), turns.lengths[turns.starts + 1])


def num_pairs(batch: pa.RecordBatch) -> Indices:
    """int64 [rows]: at least 1."""
    return np.maximum(_Turns(batch).pairs, 1)


COLUMNS: dict[str, Callable[[pa.RecordBatch], Indices]] = {
    "length": _of_rows,
    "answer_length": _of_answers,
    "pair_length": _of_pairs,
    "pair_answer_length": _of_pair_answers,
}
