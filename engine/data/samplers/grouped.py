"""Batches of rows of one kind and of similar length, each row once an epoch.

As LLaVA groups them (``LengthGroupedSampler``): the rows of a kind are shuffled, cut into
mega-batches of 50 batches, and each of these is sorted by length and cut into its batches, which
come in a random order. Here nothing of that is stored: the order is a computed permutation, and a
batch is found by sorting its mega-batch alone.

Where questions and answers are padded separately, in an encoder and a decoder, the rows of a batch
should be alike in both: a mega-batch is cut in two again and again, each time sorted by the lengths
(of questions, of answers, or of both together) and cut at the place that leaves the least to pad.

Kinds are mixed evenly: 64 batches in succession have each kind by its share, in a random order.
Where the rows of a kind do not fill a whole number of batches, its last two share what is left, as
in other samplers, and all such batches come last in the epoch, the smallest at its end.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property

import numpy as np

from engine.data.permutation import Indices, Permutation, hash64
from engine.data.samplers.pool import Sampler, SamplerInputs, Spans, TextLengths, split_pool

_BATCHES = 50  # of a mega-batch
_BLOCK = 64  # batches within which kinds are mixed
_MIXED = -1  # stands for the kind of a batch of several


class Kind:
    """The rows of one kind: ``rows[d]`` of dataset d, all of them where that is None.

    ``lent`` rows, others in each epoch, are for a batch of mixed kinds, and in none of these.
    """

    def __init__(
        self,
        number: int,
        rows: Sequence[np.ndarray | None],
        texts: TextLengths,
        batch_size: int,
        lent: int = 0,
    ) -> None:
        self._number, self._rows, self._texts = number, rows, texts
        self._sizes = [
            len(all_rows if own is None else own)
            for own, all_rows in zip(rows, texts.lengths, strict=True)
        ]
        self.total, self.lent, self._batch_size = sum(self._sizes), lent, batch_size
        own = self.total - lent
        self.full = own // batch_size - (own % batch_size > 0 and own > batch_size)
        left = own - self.full * batch_size
        # Of what full batches leave over: one batch, or two that share it.
        self.last = [left] if left <= batch_size else [left - left // 2, left // 2]
        self._sorted: tuple[tuple[int, int, int], Indices, Indices] | None = None

    def lent_rows(self, seed: int, epoch: int) -> Indices:
        """[n, 2] of (dataset, row)."""
        return self._group(seed, epoch, -2, self.total - self.lent, [self.lent])[0]

    def batch(self, seed: int, epoch: int, number: int) -> Indices:
        """[n, 2] of (dataset, row): a full batch by its number, then those of ``last``."""
        if number < self.full:
            group, place = divmod(number, _BATCHES)
            first = group * _BATCHES
            sizes = [self._batch_size] * min(_BATCHES, self.full - first)
        else:
            group, place, first, sizes = -1, number - self.full, self.full, self.last
        rows, starts = self._group(seed, epoch, group, first * self._batch_size, sizes)
        return rows[starts[place] : starts[place] + sizes[place]]

    def _group(
        self, seed: int, epoch: int, group: int, start: int, sizes: list[int]
    ) -> tuple[Indices, Indices]:
        """A mega-batch's rows, sorted by length, and where each of its batches begins in them.

        The result of the last call is kept.
        """
        asked = (seed, epoch, group)
        if self._sorted is None or self._sorted[0] != asked:
            order = Permutation(self.total, seed, 9, epoch, self._number)
            rows = split_pool(order(np.arange(start, start + sum(sizes))), self._sizes)
            lengths, answers = self._look_up(rows)
            # The sizes are given; which part of the sorted rows a batch takes is random.
            order = Permutation(len(sizes), seed, 8, epoch, self._number, group)
            parts = np.argsort(order(np.arange(len(sizes))))
            in_order = np.array(sizes)[parts]
            begins = np.cumsum(in_order) - in_order
            starts = np.empty(len(sizes), np.int64)
            starts[parts] = begins
            if self._texts.answers is None:
                by_length = np.argsort(-lengths, kind="stable")
            else:
                by_length = _alike(np.maximum(lengths - answers, 0), answers, begins)
            self._sorted = asked, rows[by_length], starts
        return self._sorted[1:]

    def _look_up(self, rows: Indices) -> tuple[Indices, Indices]:
        """Lengths of rows and of their answers; the rows' places in the kind become places in
        their datasets."""
        lengths, answers = np.empty(len(rows), np.int64), np.zeros(len(rows), np.int64)
        for dataset in np.unique(rows[:, 0]).tolist():
            here = rows[:, 0] == dataset
            own = self._rows[dataset]
            if own is not None:
                rows[here, 1] = own[rows[here, 1]]
            lengths[here] = np.abs(self._texts.lengths[dataset][rows[here, 1]].astype(np.int64))
            if self._texts.answers is not None:
                answers[here] = self._texts.answers[dataset][rows[here, 1]]
        return lengths, answers


def _alike(questions: Indices, answers: Indices, begins: Indices) -> Indices:
    """An order of rows in which the batches that begin at ``begins`` pad little in either part.

    Each set of batches is cut in two where that pads least, sorted by either part or by both.
    """
    order = np.arange(len(questions))
    ends = np.append(begins[1:], len(questions))
    todo = [(0, len(begins))]
    while todo:
        first, last = todo.pop()
        if last - first < 2:
            continue
        here = slice(int(begins[first]), int(ends[last - 1]))
        parts = questions[order[here]], answers[order[here]]
        cuts = begins[first + 1 : last] - here.start
        ways = [_cut(key, parts, cuts) for key in (*parts, parts[0] + parts[1])]
        _, cut, by_key = min(ways, key=lambda way: way[0])
        order[here] = order[here][by_key]
        todo += [(first, first + 1 + cut), (first + 1 + cut, last)]
    return order


def _cut(key: Indices, parts: Sequence[Indices], cuts: Indices) -> tuple[int, int, Indices]:
    """What is padded to at the best of ``cuts``, its number, and the order by falling ``key``."""
    by_key = np.argsort(-key, kind="stable")
    padded = np.zeros(len(cuts), np.int64)
    for part in (own[by_key] for own in parts):
        before = np.maximum.accumulate(part)[cuts - 1]
        behind = np.maximum.accumulate(part[::-1])[::-1][cuts]
        padded = padded + (before * cuts + behind * (len(part) - cuts)).astype(np.int64)
    best = int(padded.argmin())
    return int(padded[best]), best, by_key


class Grouped(Sampler):
    """Each row once an epoch. Memory: what ``kinds`` hold, and one mega-batch of each."""

    def __init__(self, inputs: SamplerInputs, kinds: Sequence[Kind], texts: TextLengths) -> None:
        Spans(sum(inputs.sizes), inputs.batch_size)  # raises UserError for less than one batch
        self._seed, self._kinds, self._texts = inputs.seed, kinds, texts
        self._drawn: tuple[tuple[int, int], Indices, Indices] | None = None
        self._full = np.array([kind.full for kind in kinds])
        last = [(size, number, place) for number, kind in enumerate(kinds)
                for place, size in enumerate(kind.last) if size]  # fmt: skip
        if mixed := sum(kind.lent for kind in kinds):
            last.append((mixed, _MIXED, 0))
        self._last = sorted(last, key=lambda each: -each[0])
        self.steps = int(self._full.sum()) + len(self._last)

    @cached_property
    def lengths_digest(self) -> str:
        found = hashlib.blake2b(digest_size=8)
        for lengths in [*self._texts.lengths, *(self._texts.answers or ())]:
            found.update(np.ascontiguousarray(lengths, np.int32).data)
        return found.hexdigest()

    def batch(self, epoch: int, step: int) -> Indices:
        if not 0 <= step < self.steps:
            raise IndexError(f"step {step} is outside an epoch of {self.steps} steps")
        full = int(self._full.sum())
        if step >= full:
            _, kind, place = self._last[step - full]
            if kind == _MIXED:
                lent = [each.lent_rows(self._seed, epoch) for each in self._kinds]
                return np.concatenate(lent)
            return self._kinds[kind].batch(self._seed, epoch, self._kinds[kind].full + place)
        block, place = divmod(step, _BLOCK)
        kinds, numbers = self._block(epoch, block, full)
        return self._kinds[kinds[place]].batch(self._seed, epoch, int(numbers[place]))

    def _block(self, epoch: int, block: int, full: int) -> tuple[Indices, Indices]:
        """The kinds of a block's batches, and the number of each in its kind; the last is kept."""
        if self._drawn is None or self._drawn[0] != (epoch, block):
            first, end = block * _BLOCK, min((block + 1) * _BLOCK, full)
            before, after = self._counts(epoch, first, full), self._counts(epoch, end, full)
            order = Permutation(end - first, self._seed, 10, epoch, block)(np.arange(end - first))
            kinds = np.searchsorted(np.cumsum(after - before), order, side="right")
            numbers = np.empty_like(kinds)
            for kind in range(len(before)):
                here = kinds == kind
                numbers[here] = before[kind] + np.arange(here.sum())
            self._drawn = (epoch, block), kinds, numbers
        return self._drawn[1:]

    def _counts(self, epoch: int, step: int, full: int) -> Indices:
        """Batches of each kind among the first ``step``: in proportion, randomly rounded."""
        ends = np.cumsum(self._full)
        offset = hash64(self._seed, 11, epoch) % full
        return np.diff((ends * step + offset) // full, prepend=0)
