"""Datasets whose shards are not at hand: read from front to end, never by row.

A training split of remote shards is streamed. A validation split is read in any order and more than
once, so its shards are copied into the cache folder and read there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NoReturn

from engine.data.stream.count import count_samples, digest
from engine.data.stream.shard import WHOLE_SHARD, Item, read_shard
from engine.data.tar.texts import TextForm
from engine.errors import UserError
from engine.types import Row, Source

_SHIFT = 32  # a row is the shard's number shifted by this, and the sample's number in the shard


@dataclass
class StreamSource(Source):
    """The training split of a dataset of streamed shards.

    ``length`` is the number of its samples where it is known, else they are counted once.
    ``window`` is the number of samples within which a reader shuffles.
    """

    name: str
    urls: Sequence[str]
    form: TextForm
    window: int
    cache_dir: Path
    length: int | None = None
    split: str = "train"

    def __len__(self) -> int:
        return self._counted if self.length is None else self.length

    @cached_property
    def _counted(self) -> int:
        return count_samples(self.urls, self._read_url, name=self.name, cache_dir=self.cache_dir)

    @property
    def identity(self) -> str:
        """Equal for sources whose samples come in the same order."""
        return f"{digest(self.urls)}, window {self.window}"

    def read(self, shard: int) -> Iterator[Item]:
        """The samples of a shard in order, and at the end what is wrong with it."""
        return self._read_url(self.urls[shard])

    def _read_url(self, url: str) -> Iterator[Item]:
        return read_shard(url, self.form)

    def captions(self) -> Iterator[str]:
        """All captions in order, by a pass over all shards."""
        for shard in range(len(self.urls)):
            for item in self.read(shard):
                if item.record is not None:
                    yield item.record.caption

    def place(self, row: int) -> str:
        """A row as a message names it: ``URL#number of the sample``."""
        shard, number = row >> _SHIFT, row & WHOLE_SHARD
        return self.urls[shard] + ("" if number == WHOLE_SHARD else f"#{number}")

    def __getitem__(self, index: int) -> Row:
        self._refuse()

    def column(self, name: str) -> NoReturn:
        """Raises UserError: streamed rows have no columns."""
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise UserError(
            f"dataset {self.name!r} is streamed for training, and cannot be read by row; "
            "copy its shards to this machine for that, or name them as a validation split"
        )


def row_of(shard: int, number: int) -> int:
    """The row of a sample, by its shard's number and its own in the shard."""
    return shard << _SHIFT | number


def streams(sources: Sequence[object]) -> list[StreamSource]:
    """All of ``sources`` if they are streamed, none if none is. Raises UserError for a mixture."""
    found = [source for source in sources if isinstance(source, StreamSource)]
    if found and len(found) < len(sources):
        names = ", ".join(source.name for source in found)
        raise UserError(
            f"data.train_name lists streamed datasets ({names}) beside others that are read by row;"
            " stream all of them (stream: true on shards of this machine) or none",
            key="data.train_name",
        )
    return found
