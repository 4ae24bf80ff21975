"""Views: a dataset's rows chosen, repeated or put together otherwise than its files have them.

    Subset          a fixed random choice of the rows
    Repeated        every row several times an epoch
    Concatenated    several datasets as one (torch's ConcatDataset)
    OneCaption      a row an image: in each epoch another of its captions, by (seed, epoch, image)
    JoinedCaptions  a row an image, with all of its captions as one text
    Flattened       a row a question of a conversation, with its answer

A view holds nothing that grows with the number of rows: the row below is computed, or found in a
memory-mapped file that all processes share.
"""

from __future__ import annotations

from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import accumulate, chain, zip_longest
from math import gcd
from typing import NamedTuple

import numpy as np

from engine.data.groups import Groups
from engine.data.permutation import Indices, Permutation, hash64
from engine.types import BadSample, Row, Source, Turn

BLOCK = 1 << 18  # captions whose rows are looked up at once
IMAGE = "<image>"  # where a conversation has an image
_LENGTHS = ("length", "answer_length")
_SAME_IN_ALL_PARTS = ("label", *_LENGTHS)  # columns whose values mean the same in every part


class Draw(NamedTuple):
    """What a row's random choices depend on: the run's seed, and how often it was shown before."""

    seed: int
    times: int


Below = tuple[Source, int, Draw | None]
"""A row one level down."""


class View(Source):
    """Rows that are made of those of the sources ``below``."""

    def __init__(self, below: Sequence[Source], length: int, name: str = "") -> None:
        self._below, self._length = tuple(below), length
        self.source = below[0]
        self.name, self.split = name or self.source.name, self.source.split
        self.classes = self.source.classes

    @property
    def below(self) -> Sequence[Source]:
        return self._below

    def __len__(self) -> int:
        return self._length

    def check(self, index: int) -> None:
        """Raises IndexError."""
        if not 0 <= index < self._length:
            raise IndexError(f"row {index} of {self._length} of {self.name}")

    def captions(self) -> Iterator[str]:
        for start in range(0, self._length, BLOCK):
            yield from self.captions_of(np.arange(start, min(start + BLOCK, self._length)))


class Choice(View):
    """A view whose every row is one of those below."""

    @abstractmethod
    def at(self, index: int, draw: Draw | None) -> Below:
        """The row below."""

    def first_below(self, rows: Indices) -> Indices:
        """Of some rows, the first that may be shown of the one source below."""
        raise NotImplementedError

    def __getitem__(self, index: int) -> Row:
        """The row at ``index``, of several captions the first; raises BadSample."""
        source, row = origin(self, index)
        return source[row]

    def column(self, name: str) -> np.ndarray:
        return np.asarray(self.source.column(name))[self.first_below(np.arange(len(self)))]

    def captions_of(self, rows: Indices) -> Iterator[str]:
        return self.source.captions_of(self.first_below(rows))


def origin(source: Source, row: int, draw: Draw | None = None) -> tuple[Source, int]:
    """The dataset that a row comes from, and its number there. Raises IndexError."""
    while isinstance(source, Choice):
        source.check(row)
        source, row, draw = source.at(row, draw)
    return source, row


class Subset(Choice):
    """A random choice of ``size`` rows, the same for the same seed and number of rows."""

    def __init__(self, source: Source, size: int, seed: int) -> None:
        super().__init__([source], size)
        self._chosen = Permutation(len(source), seed, 4)  # a run's orders are drawn otherwise

    def at(self, index: int, draw: Draw | None) -> Below:
        return self.source, self._chosen.at(index), draw

    def first_below(self, rows: Indices) -> Indices:
        return self._chosen(rows)


class Repeated(Choice):
    """Every row ``times`` times an epoch, each time with an augmentation of its own; where images
    have several captions, with the next of them."""

    def __init__(self, source: Source, times: int) -> None:
        super().__init__([source], len(source) * times)
        self.times = times

    def at(self, index: int, draw: Draw | None) -> Below:
        time, row = divmod(index, len(self.source))
        if draw is not None:
            draw = draw._replace(times=draw.times * self.times + time)
        return self.source, row, draw

    def first_below(self, rows: Indices) -> Indices:
        return rows % len(self.source)

    @property
    def blocks(self) -> Indices | None:
        own = self.source.blocks
        return None if own is None else np.tile(own, self.times)


class Concatenated(Choice):
    """Several datasets counted as one, end to end. Equal ids of different parts stay different."""

    def __init__(self, name: str, parts: Sequence[Source]) -> None:
        super().__init__(parts, sum(map(len, parts)), name)
        self.parts = tuple(parts)
        self._ends = list(accumulate(map(len, parts)))

    def at(self, index: int, draw: Draw | None) -> Below:
        part = bisect_right(self._ends, index)
        return self.parts[part], index - (self._ends[part - 1] if part else 0), draw

    @property
    def blocks(self) -> Indices | None:
        own = [each for part in self.parts if (each := part.blocks) is not None]
        return np.concatenate(own) if len(own) == len(self.parts) else None

    def column(self, name: str) -> np.ndarray:
        codes, used = [], 0
        for part in self.parts:
            own = np.asarray(part.column(name))
            same = name in _SAME_IN_ALL_PARTS
            codes.append(own if same else np.where(own < 0, own, own + used))
            used += int(own.max(initial=-1)) + 1
        return np.concatenate(codes)

    def captions(self) -> Iterator[str]:
        return chain.from_iterable(part.captions() for part in self.parts)

    def captions_of(self, rows: Indices) -> Iterator[str]:
        for row in rows.tolist():
            part, own, _ = self.at(row, None)
            yield from part.captions_of(np.array([own]))


class OneCaption(Choice):
    """A row an image. The n captions of an image take turns: each once in n epochs, in an order of
    its own every time. ``captions()`` yields all that may be shown, image after image."""

    def __init__(self, source: Source, groups: Groups) -> None:
        super().__init__([source], len(groups))
        self.groups = groups

    def at(self, index: int, draw: Draw | None) -> Below:
        rows = self.groups[index]
        if draw is None or len(rows) == 1:
            return self.source, int(rows[0]), draw
        return self.source, int(rows[_in_turn(len(rows), index, draw)]), draw

    @property
    def blocks(self) -> Indices | None:
        return _images_of_blocks(self.source, self.groups)

    def first_below(self, rows: Indices) -> Indices:
        return self.groups.firsts()[rows]

    def captions_of(self, rows: Indices) -> Iterator[str]:
        return chain.from_iterable(map(self.source.captions_of, map(self.groups.__getitem__, rows)))


class JoinedCaptions(View):
    """A row an image, its captions joined by ``separator``; other texts follow one another.

    The image is that of its first row that can be used.
    """

    def __init__(self, source: Source, groups: Groups, separator: str) -> None:
        super().__init__([source], len(groups))
        self.groups, self.separator = groups, separator

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
            turns=joined(row.turns for row in found),
            answers=tuple(answer for row in found for answer in row.answers),
            labels=tuple(dict.fromkeys(label for row in found for label in row.labels)),
        )

    @property
    def blocks(self) -> Indices | None:
        return _images_of_blocks(self.source, self.groups)

    def column(self, name: str) -> np.ndarray:
        """int64 codes of each image's first row; of lengths the sum, int32."""
        own = np.asarray(self.source.column(name))
        if name not in _LENGTHS:
            return own[self.groups.firsts()]
        lengths, sizes = own[self.groups.rows], self.groups.sizes(0, len(self))
        firsts = np.cumsum(sizes) - sizes
        totals = np.add.reduceat(np.abs(lengths), firsts)
        return (np.sign(lengths[firsts]) * totals).astype(np.int32)

    def captions_of(self, rows: Indices) -> Iterator[str]:
        for image in rows.tolist():
            yield self._joined(self.source.captions_of(self.groups[image]))

    def _joined(self, captions: Iterable[str]) -> str:
        return self.separator.join(stripped for c in captions if (stripped := c.strip()))


class Flattened(View):
    """A row a pair of turns; a row of ``source`` without any stays as it is.

    A pair has the images that its own question marks, or else those that the conversation has
    shown so far, whose marks then come before its question. Nothing is marked where nothing was:
    neither in text alone, nor where the template says where images stand.
    """

    def __init__(self, source: Source) -> None:
        self._ends = source.column("pair_ends")
        super().__init__([source], int(self._ends[-1]))

    def __getitem__(self, index: int) -> Row:
        """The pair at ``index``; raises BadSample where its conversation cannot be used."""
        self.check(index)
        row = int(np.searchsorted(self._ends, index, side="right"))
        pair = index - (int(self._ends[row - 1]) if row else 0)
        return one_pair(self.source[row], pair)

    @property
    def blocks(self) -> Indices | None:
        own = self.source.blocks
        if own is None:
            return None
        rows = np.cumsum(own)  # a shard may be without any
        return np.diff(np.where(rows > 0, self._ends[rows - 1], 0), prepend=0)

    def column(self, name: str) -> np.ndarray:
        """int64 codes of ``image_id`` or ``caption_id``, or int32 ``length`` or ``answer_length``,
        of all pairs."""
        if name in _LENGTHS:
            return self.source.column(f"pair_{name}")
        counts = np.diff(self._ends, prepend=0)
        codes = np.repeat(np.asarray(self.source.column(name), np.int64), counts)
        if name != "caption_id":
            return codes
        pairs = np.arange(len(self)) - np.repeat(self._ends - counts, counts)
        return np.where(codes < 0, codes, codes * counts.max() + pairs)

    def captions(self) -> Iterator[str]:
        """All answers in order, without their images."""
        rows = zip(self.source.conversations(), self.source.captions(), strict=True)
        for turns, caption in rows:
            yield from [turns[place + 1][1] for place in pairs_of(turns)] or [caption]


def _in_turn(num: int, image: int, draw: Draw) -> int:
    """Which of an image's ``num`` captions is next: from a random one on by a random stride that
    shares no factor with ``num``, so that ``num`` times show each once."""
    turn, place = divmod(draw.times, num)
    start, stride = divmod(hash64(draw.seed, image, turn, 5), num)
    while gcd(stride, num) > 1:
        stride += 1
    return (start + place * stride) % num


def _images_of_blocks(source: Source, groups: Groups) -> Indices | None:
    """How many images begin in each shard of ``source``: images come in the order of their rows."""
    own = source.blocks
    if own is None:
        return None
    return np.diff(np.searchsorted(groups.firsts(), np.cumsum(own)), prepend=0)


def pairs_of(turns: Sequence[Turn]) -> list[int]:
    """Where in a conversation a human speaks whom an answer follows."""
    return [
        place
        for place, (turn, after) in enumerate(zip_longest(turns, turns[1:]))
        if turn[0] == "human" and after is not None and after[0] == "gpt"
    ]


def joined(conversations: Iterable[Sequence[Turn]]) -> tuple[Turn, ...]:
    """Conversations about the same images as one: only the first that marks them does so."""
    turns: list[Turn] = []
    for conversation in conversations:
        marked = any(IMAGE in text for _, text in turns)
        turns += [(who, _unmarked(text)) if marked else (who, text) for who, text in conversation]
    return tuple(turns)


def _unmarked(text: str) -> str:
    return text.replace(f"{IMAGE}\n", "").replace(f"\n{IMAGE}", "").replace(IMAGE, "")


def one_pair(row: Row, number: int) -> Row:
    """The conversation's pair of that number as a row of its own."""
    places = pairs_of(row.turns)
    if not places:
        return row
    place = places[number]
    (_, asked), answer = row.turns[place : place + 2]
    images = row.images
    marks = [text.count(IMAGE) if who == "human" else 0 for who, text in row.turns]
    if images and sum(marks) == len(images):
        before = sum(marks[:place])
        if marks[place]:
            images = images[before : before + marks[place]]
        else:
            images = images[:before]
            asked = f"{IMAGE}\n" * before + asked
    return replace(
        row,
        images=images,
        caption=answer[1],
        caption_id=f"{row.caption_id}#{number}",
        turns=(("human", asked), answer),
    )
