"""``data.conversations: flatten``: every question of a conversation, with its answer, as a row."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import zip_longest

import numpy as np

from engine.data.permutation import Indices
from engine.types import Row, Source, Turn

IMAGE = "<image>"  # where a conversation has an image


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


class Flattened(Source):
    """A row a pair of turns; a row of ``source`` without any stays as it is.

    A pair has the images that its own question marks, or else those that the conversation has
    shown so far, which then stand before its question. Nothing is marked where nothing was: neither
    in text alone, nor where the template says where images stand.
    """

    def __init__(self, source: Source) -> None:
        self.source, self.name, self.split = source, source.name, source.split
        self.classes = source.classes
        self._ends = source.column("pair_ends")

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Row:
        """The pair at ``index``; raises BadSample where its conversation cannot be used."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)} of {self.name}")
        row = int(np.searchsorted(self._ends, index, side="right"))
        pair = index - (int(self._ends[row - 1]) if row else 0)
        return one_pair(self.source[row], pair)

    def column(self, name: str) -> np.ndarray:
        """int64 codes of ``image_id`` or ``caption_id``, or int32 ``length`` or ``answer_length``,
        of all pairs."""
        if name in ("length", "answer_length"):
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

    @property
    def blocks(self) -> Indices | None:
        """Pairs of each shard; None where the dataset does not lie in shards."""
        own = self.source.blocks
        if own is None:
            return None
        rows = np.cumsum(own)  # a shard may be without any
        return np.diff(np.where(rows > 0, self._ends[rows - 1], 0), prepend=0)

    @property
    def below(self) -> Sequence[Source]:
        return (self.source,)


def one_pair(record: Row, number: int) -> Row:
    """The conversation's pair of that number as a record of its own."""
    places = pairs_of(record.turns)
    if not places:
        return record
    place = places[number]
    (_, asked), answer = record.turns[place : place + 2]
    images = record.images
    marks = [text.count(IMAGE) if who == "human" else 0 for who, text in record.turns]
    if images and sum(marks) == len(images):
        before = sum(marks[:place])
        if marks[place]:
            images = images[before : before + marks[place]]
        else:
            images = images[:before]
            asked = f"{IMAGE}\n" * before + asked
    return replace(
        record,
        images=images,
        caption=answer[1],
        caption_id=f"{record.caption_id}#{number}",
        turns=(("human", asked), answer),
    )
