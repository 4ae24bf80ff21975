"""Batches of rows of one kind and of similar length, each row once an epoch.

As LLaVA groups them (``LengthGroupedSampler``): the rows of a kind are shuffled, cut into
mega-batches of 50 batches, and each of these is sorted by length and cut into its batches, which
come in a random order. Here nothing of that is stored: a batch is found by sorting its mega-batch.

Where questions and answers are padded separately, in an encoder and a decoder, a mega-batch is cut
in two again and again, each time sorted by the lengths of questions, of answers, or of both
together, and cut at the place that leaves the least to pad.

Kinds are mixed evenly: 64 batches in succession have each kind by its share, in a random order.
Where the rows of a kind do not fill a whole number of batches, its last two share what is left, and
all such batches come last in the epoch, the smallest at its end.
"""

import hashlib
from collections.abc import Sequence

import numpy as np

from engine.data.permutation import Indices, Permutation, hash64
from engine.data.samplers.pool import (
    Sampler,
    SamplerInputs,
    TextLengths,
    cut_pool,
    num_batches,
    split_pool,
)

_BATCHES = 50  # of a mega-batch
_BLOCK = 64  # batches within which kinds are mixed


class Kind:
    """The rows of one kind: ``rows[d]`` of dataset d, all of them where that is None.

    Its batches are numbered: ``full`` ones, those of the sizes ``last``, and one of ``lent`` rows,
    others in each epoch, which are for a batch of mixed kinds.
    """

    def __init__(
        self,
        number: int,
        rows: Sequence[np.ndarray | None],
        texts: TextLengths,
        inputs: SamplerInputs,
        lent: int = 0,
    ) -> None:
        self._number, self._rows, self._texts, self._seed = number, rows, texts, inputs.seed
        self._sizes = [
            len(all_rows if own is None else own)
            for own, all_rows in zip(rows, texts.lengths, strict=True)
        ]
        self.lent, self._batch_size = lent, inputs.batch_size
        self.full, self.last = cut_pool(sum(self._sizes) - lent, self._batch_size)
        self._sorted: tuple[tuple[int, int], Indices, Indices] | None = None  # the last mega-batch

    def batch(self, epoch: int, number: int) -> Indices:
        """[n, 2] of (dataset, row)."""
        place, size = number - self.full, self._batch_size
        if place < 0:
            group, place = divmod(number, _BATCHES)
            sizes = [size] * min(_BATCHES, self.full - group * _BATCHES)
            start = group * _BATCHES * size
        elif place < len(self.last):
            group, sizes, start = -1, self.last, self.full * size
        else:
            group, place, sizes, start = -2, 0, [self.lent], sum(self._sizes) - self.lent
        if self._sorted is None or self._sorted[0] != (epoch, group):
            self._sorted = (epoch, group), *self._sort(epoch, group, start, sizes)
        _, rows, starts = self._sorted
        return rows[starts[place] : starts[place] + sizes[place]]

    def _sort(
        self, epoch: int, group: int, start: int, sizes: list[int]
    ) -> tuple[Indices, Indices]:
        """A mega-batch's rows, sorted by length, and where each of its batches begins in them."""
        order = Permutation(sum(self._sizes), self._seed, 9, epoch, self._number)
        rows = split_pool(order(np.arange(start, start + sum(sizes))), self._sizes)
        lengths, answers = self._look_up(rows)
        # The sizes are given; which part of the sorted rows a batch takes is random.
        order = Permutation(len(sizes), self._seed, 8, epoch, self._number, group)
        parts = np.argsort(order(np.arange(len(sizes))))
        in_order = np.array(sizes)[parts]
        begins = np.cumsum(in_order) - in_order
        starts = np.empty(len(sizes), np.int64)
        starts[parts] = begins
        if self._texts.answers is None:
            return rows[np.argsort(-lengths, kind="stable")], starts
        return rows[_alike(np.maximum(lengths - answers, 0), answers, begins)], starts

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
    """Each row once an epoch. Memory: what ``kinds`` hold, and one mega-batch of each.

    Raises UserError for less than one batch.
    """

    def __init__(self, inputs: SamplerInputs, texts: TextLengths, kinds: Sequence[Kind]) -> None:
        super().__init__(inputs)
        num_batches(sum(self._sizes), self._batch_size)  # at least one
        self._kinds, self._ends = kinds, np.cumsum([kind.full for kind in kinds])
        self._full = int(self._ends[-1])
        last = [(size, [(kind, kind.full + place)])
                for kind in kinds for place, size in enumerate(kind.last)]  # fmt: skip
        if mixed := sum(kind.lent for kind in kinds):
            last.append((mixed, [(kind, kind.full + len(kind.last)) for kind in kinds]))
        # Largest first: the kinds' batches that make up one of the epoch's last.
        self._last = [parts for _, parts in sorted(last, key=lambda each: -each[0])]
        self.steps = self._full + len(self._last)
        digest = hashlib.blake2b(digest_size=8)
        for lengths in [*texts.lengths, *(texts.answers or ())]:
            digest.update(np.ascontiguousarray(lengths, np.int32).data)
        self.lengths_digest = digest.hexdigest()

    def batch(self, epoch: int, step: int) -> Indices:
        self._check(step)
        if step >= self._full:
            parts = self._last[step - self._full]
            return np.concatenate([kind.batch(epoch, number) for kind, number in parts])
        block, place = divmod(step, _BLOCK)
        first, end = step - place, min(step - place + _BLOCK, self._full)
        before, after = self._counts(epoch, first), self._counts(epoch, end)
        order = Permutation(end - first, self._seed, 10, epoch, block)(np.arange(place + 1))
        kinds = np.searchsorted(np.cumsum(after - before), order, side="right")
        number = before[kinds[place]] + (kinds[:place] == kinds[place]).sum()
        return self._kinds[kinds[place]].batch(epoch, int(number))

    def _counts(self, epoch: int, step: int) -> Indices:
        """Batches of each kind among the first ``step``: in proportion, randomly rounded."""
        offset = hash64(self._seed, 11, epoch) % self._full
        return np.diff((self._ends * step + offset) // self._full, prepend=0)
