"""A row for each image of a dataset that has several captions of some.

    OneCaption      in each epoch another of the image's captions, by (seed, epoch, image) alone
    JoinedCaptions  all of them as one text

Which rows are of one image lies in a memory-mapped file that all processes share.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from math import gcd

import numpy as np

from engine.data.permutation import Indices, hash64
from engine.data.views.caption_order import BLOCK, captions_at, in_blocks
from engine.data.views.groups import Groups
from engine.data.views.rows import Draw, Place, View
from engine.data.views.turns import joined
from engine.types import BadSample, Row, Source


class OneCaption(View):
    """A row an image. The n captions of an image take turns: each once in n epochs, in an order of
    its own every time. ``captions()`` yields all that may be shown, image after image."""

    def __init__(self, source: Source, groups: Groups) -> None:
        super().__init__(source, len(groups))
        self.groups = groups

    def _at(self, index: int, draw: Draw | None) -> Place:
        rows = self.groups[index]
        if draw is None or len(rows) == 1:
            return self.source, int(rows[0]), draw
        return self.source, int(rows[_in_turn(len(rows), index, draw)]), draw

    @property
    def blocks(self) -> Indices | None:
        return _blocks(self.source, self.groups)

    def column(self, name: str) -> np.ndarray:
        return np.asarray(self.source.column(name))[self.groups.firsts()]

    def captions(self) -> Iterator[str]:
        return captions_at(self.source, in_blocks(self.groups.rows))

    def captions_of(self, images: Indices) -> Iterator[str]:
        """All captions of some images."""
        rows = (self.groups[image] for image in images.tolist())
        return captions_at(self.source, [np.concatenate(list(rows))])


class JoinedCaptions(Source):
    """A row an image, its captions joined by ``separator``; other texts follow one another.

    The image is that of its first row that can be used.
    """

    def __init__(self, source: Source, groups: Groups, separator: str) -> None:
        self.source, self.groups, self.separator = source, groups, separator
        self.classes = source.classes
        self.name, self.split = source.name, source.split

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> Row:
        """The image at ``index``; raises BadSample where none of its rows can be used."""
        found: list[Row] = []
        first_bad: BadSample | None = None
        for row in self.groups[index].tolist():
            try:
                found.append(self.source[row])
            except BadSample as bad:
                first_bad = first_bad or bad
        if not found:
            assert first_bad is not None  # an image has at least one row
            raise first_bad
        return replace(
            found[0],
            caption=self._joined(row.caption for row in found),
            turns=joined(record.turns for record in found),
            answers=tuple(answer for record in found for answer in record.answers),
            labels=tuple(dict.fromkeys(label for record in found for label in record.labels)),
        )

    def column(self, name: str) -> np.ndarray:
        """int64 codes of each image's first row; of lengths the sum, int32."""
        if name in ("length", "answer_length"):
            return self._lengths(name)
        return np.asarray(self.source.column(name))[self.groups.firsts()]

    def captions(self) -> Iterator[str]:
        """All joined captions in order."""
        captions = captions_at(self.source, in_blocks(self.groups.rows))
        for start in range(0, len(self), BLOCK):
            for size in self.groups.sizes(start, min(start + BLOCK, len(self))).tolist():
                yield self._joined(islice(captions, size))

    def _lengths(self, name: str) -> np.ndarray:
        lengths = np.asarray(self.source.column(name))[self.groups.rows]
        firsts = np.cumsum(self.groups.sizes(0, len(self))) - self.groups.sizes(0, len(self))
        totals = np.add.reduceat(np.abs(lengths), firsts)
        return (np.sign(lengths[firsts]) * totals).astype(np.int32)

    def _joined(self, captions: Iterable[str]) -> str:
        return self.separator.join(stripped for c in captions if (stripped := c.strip()))

    @property
    def blocks(self) -> Indices | None:
        """Images of each shard; None where the dataset does not lie in shards."""
        return _blocks(self.source, self.groups)

    @property
    def below(self) -> Sequence[Source]:
        return (self.source,)


def _in_turn(num: int, image: int, draw: Draw) -> int:
    """Which of an image's ``num`` captions is next: from a random one on by a random stride that
    shares no factor with ``num``, so that ``num`` times show each once."""
    turn, place = divmod(draw.times, num)
    start, stride = divmod(hash64(draw.seed, image, turn, 5), num)
    while gcd(stride, num) > 1:
        stride += 1
    return (start + place * stride) % num


def _blocks(source: Source, groups: Groups) -> Indices | None:
    """How many images begin in each shard of ``source``: images come in the order of their rows."""
    own = source.blocks
    if own is None:
        return None
    return np.diff(np.searchsorted(groups.firsts(), np.cumsum(own)), prepend=0)
