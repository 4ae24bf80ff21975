"""Whole batches of streamed samples, put together in each worker process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch.utils.data import IterableDataset, get_worker_info

from engine.data.bad_samples import BadRecord
from engine.data.batch_memory import BatchBuffer
from engine.data.loader import Collate, Loaded, returning_errors, seeded
from engine.data.reader import Limits, Reader, Transform
from engine.data.stream.order import Course, Order, Taken
from engine.data.stream.shard import WHOLE_SHARD, Item
from engine.data.stream.source import StreamSource, row_of
from engine.data.workers import Workers
from engine.types import BadSample, Row, Sample, Source

_MAX_BAD = 1000  # samples passed over for one batch, before it is given as it is


@dataclass(frozen=True)
class Pool:
    """The shards of all streamed datasets as one list: number → (dataset, shard of it)."""

    sources: Sequence[StreamSource]

    def __len__(self) -> int:
        return sum(len(source.urls) for source in self.sources)

    def locate(self, shard: int) -> tuple[int, int]:
        """Dataset of a shard, and the shard's number there."""
        for dataset, source in enumerate(self.sources):
            if shard < len(source.urls):
                return dataset, shard
            shard -= len(source.urls)
        raise IndexError("there is no such shard")

    def read(self, shard: int) -> Iterator[Item]:
        """A shard's samples in order, and at the end what is wrong with it."""
        dataset, number = self.locate(shard)
        return self.sources[dataset].read(number)

    @property
    def window(self) -> int:
        """Samples that a reader shuffles: as many as the dataset that asks for most."""
        return max(source.window for source in self.sources)


class _Shelf:
    """The one record at hand, for the reader of map-style rows."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.item: Item | None = None

    def __getitem__(self, row: int) -> Row:
        assert self.item is not None
        if self.item.record is None:
            raise self.item.bad or BadSample("unreadable")
        return self.item.record


class Batches(IterableDataset):
    """Batches of ``batch_size`` samples with their steps' numbers, for one rank.

    Worker w of W gives steps ``base`` + w, ``base`` + w + W, …, up to ``total_steps``. A sample
    that cannot be used is told, and the next one taken in its place.
    """

    def __init__(
        self,
        pool: Pool,
        order: Order,
        transform: Transform,
        collate: Collate,
        *,
        batch_size: int,
        rank: int,
        world: int,
        base: int,
        total_steps: int,
        limits: Limits,
    ) -> None:
        self.pool, self.order, self.collate = pool, order, collate
        self.batch_size, self.rank, self.world = batch_size, rank, world
        self.base, self.total_steps = base, total_steps
        self.shelves = [_Shelf(source.name) for source in pool.sources]
        self.reader = Reader(cast(list[Source], self.shelves), transform, order.seed, limits)
        self.workers = Workers()

    def __iter__(self) -> _Reading:
        info = get_worker_info()
        return _Reading(self, info.id if info else 0, info.num_workers if info else 1)


class _Reading:
    """One worker's batches; what torchdata asks for its state."""

    def __init__(self, batches: Batches, worker: int, workers: int) -> None:
        self._to, self._worker, self._workers = batches, worker, workers
        self._course = Course(
            batches.order,
            worker * batches.world + batches.rank,
            batches.pool.window,
            batches.pool.read,
        )
        self._count = 0  # batches

    def state_dict(self) -> dict[str, Any]:
        return {"batches": self._count, **self._course.state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._count = state["batches"]
        self._course.restore(state)

    def __iter__(self) -> _Reading:
        return self

    def __next__(self) -> Loaded | Exception:
        step = self._to.base + self._worker + self._count * self._workers
        if step >= self._to.total_steps:
            raise StopIteration
        try:
            return returning_errors(self._load, step)
        finally:
            self._count += 1

    def _load(self, step: int) -> Loaded:
        samples: list[Sample] = []
        bad: list[BadRecord] = []
        number, size = 0, self._to.reader.size
        buffer = BatchBuffer(self._to.batch_size, size) if size else None
        while len(samples) < self._to.batch_size and len(bad) < _MAX_BAD:
            if self._to.workers.closing:
                break
            taken = next(self._course)
            number = taken.number
            read = self._read(step, taken, buffer)
            if isinstance(read, Sample):
                samples.append(read)
            else:
                bad.append(read)
        if not samples:
            return step, {}, bad
        return step, seeded(self._to.collate, samples, self._to.order.seed, number, step), bad

    def _read(self, step: int, taken: Taken, buffer: BatchBuffer | None) -> Sample | BadRecord:
        dataset, shard = self._to.pool.locate(taken.shard)
        self._to.shelves[dataset].item = taken.item
        row = row_of(shard, taken.item.number)
        read = self._to.reader.read(step, taken.number, dataset, row, buffer)
        if isinstance(read, Sample):
            return read
        source = self._to.pool.sources[dataset]
        key = source.place(row)
        if taken.item.number != WHOLE_SHARD:
            key += f" {taken.item.key}"
        return BadRecord(step, source.name, row, key, read.cause, read.detail)
