"""How long the texts of a table's rows are, counted once by Arrow's kernels: 4 bytes a row.

The length of a row is the number of characters of its conversation, or else of its caption (which a
question and its answer make): negative where the row has no image, so that it tells that too.
A *pair* is what a human says with the answer that follows; rows without any count as one pair.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from engine.data.permutation import Indices
from engine.data.tables.table import Table

_COLUMNS = ("caption", "turns", "image", "file")


def of_rows(table: Table) -> np.ndarray:
    """int32 [rows], memory-mapped."""
    return table.kept("length", np.int32, len(table), lambda: map(_row_lengths, _batches(table)))


def of_pairs(table: Table) -> np.ndarray:
    """int32 [pairs], memory-mapped: of each pair of each row, one after another."""
    total = int(pair_ends(table)[-1])
    return table.kept("pairs.length", np.int32, total, lambda: map(_pair_lengths, _batches(table)))


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


def _row_lengths(batch: pa.RecordBatch) -> Indices:
    turns = _Turns(batch)
    captions = pc.utf8_length(batch.column("caption")).fill_null(0).to_numpy()
    return _signed(np.where(turns.counts > 0, turns.totals, captions), batch)


def _pair_lengths(batch: pa.RecordBatch) -> Indices:
    turns, rows = _Turns(batch), _row_lengths(batch)
    counts = np.maximum(turns.pairs, 1)
    lengths = np.repeat(rows, counts)
    own = np.repeat(turns.pairs > 0, counts)
    lengths[own] = np.sign(lengths[own]) * (
        turns.lengths[turns.starts] + turns.lengths[turns.starts + 1]
    )
    return lengths


def _signed(lengths: Indices, batch: pa.RecordBatch) -> Indices:
    """Negative without an image: at least one character then, since zero has no sign."""
    shown = [batch.column(name) for name in ("image", "file") if name in batch.schema.names]
    has_image = np.any([c.is_valid().to_numpy(zero_copy_only=False) for c in shown], axis=0)
    return np.where(has_image, np.maximum(lengths, 1), -np.maximum(lengths, 1))


COLUMNS: dict[str, Callable[[Table], np.ndarray]] = {
    "length": of_rows,
    "pair_ends": pair_ends,
    "pair_length": of_pairs,
}
