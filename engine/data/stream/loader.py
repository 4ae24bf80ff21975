"""Streamed training data of one rank, and the state with which it continues.

Every rank's worker processes read shards of their own and put whole batches together; torchdata's
StatefulDataLoader takes the workers' states along with their batches. A state says where a worker's
shuffle window began and how much of it was given out: a few integers. With as many ranks and
workers as before a stream continues exactly there. With others, shards that were not read to their
end are read again from their beginning, so that nothing is lost and some samples come twice.
"""

import json
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info
from torchdata.stateful_dataloader import StatefulDataLoader

from engine.data.bad_samples import BadRecord, summary
from engine.data.batch_memory import BatchBuffer
from engine.data.loader import (
    Collate,
    Loaded,
    default_workers,
    loader_options,
    returning_errors,
    seeded,
)
from engine.data.reader import Fetched, Limits, Reader, Transform
from engine.data.stream.reader import Cursor, Order, Remaining, ShardReader, Taken
from engine.data.stream.source import WHOLE_SHARD, Item, Stream, row_of
from engine.data.workers import Workers
from engine.dist import collectives
from engine.errors import FaultError, UserError
from engine.types import BadSample, Sample

State = dict[str, Any]
_PREFETCH = 2  # batches that each worker prepares ahead
_MAX_BAD = 1000  # samples skipped for one batch, before it is given as it is


@dataclass(eq=False)
class Batches(IterableDataset):
    """Batches of ``batch_size`` samples with their steps' numbers, for one rank.

    Worker w of W gives steps ``base`` + w, ``base`` + w + W, …, up to ``total_steps``. A sample
    that cannot be used is reported, and the next one taken in its place.
    """

    streams: Sequence[Stream]
    shards: Sequence[tuple[int, int]]  # of all streams: dataset, and shard of it
    order: Order
    reader: Reader
    collate: Collate
    batch_size: int
    rank: int
    world: int
    base: int
    total_steps: int
    workers: Workers = field(default_factory=Workers)

    def __iter__(self) -> Iterator[Loaded | Exception]:
        info = get_worker_info()
        return _WorkerBatches(self, info.id if info else 0, info.num_workers if info else 1)

    def read_shard(self, number: int) -> Iterator[Item]:
        """A shard's samples in order, and at the end what is wrong with it."""
        dataset, shard = self.shards[number]
        return self.streams[dataset].read(shard)

    def read(self, step: int, taken: Taken, buffer: BatchBuffer | None) -> Sample | BadRecord:
        """The sample of what was taken, or why it cannot be used."""
        (dataset, shard), item, reader = self.shards[taken.shard], taken.item, self.reader
        stream, row = self.streams[dataset], row_of(shard, item.number)
        key = stream.place(row) + ("" if item.number == WHOLE_SHARD else f" {item.key}")
        try:
            if item.row is None:
                raise item.bad or BadSample("unreadable")
            data = reader.encoded(item.row)
        except BadSample as bad:
            return BadRecord(step, stream.name, row, key, bad.cause, bad.detail)
        seed = reader.seed_of(taken.at.number, dataset, row)
        fetched = Fetched(step, stream.name, row, dataset, row, seed, item.row, data)
        read = reader.decode(fetched, buffer)
        return read if isinstance(read, Sample) else replace(read, key=key)


class _WorkerBatches(Iterator[Loaded | Exception]):
    """One worker's batches, with the state that torchdata saves."""

    def __init__(self, batches: Batches, worker: int, workers: int) -> None:
        self._batches, self._worker, self._workers = batches, worker, workers
        # Samples are shuffled among as many as the dataset that asks for most.
        window = max(stream.window for stream in batches.streams)
        reader = worker * batches.world + batches.rank
        self._reader = ShardReader(batches.order, reader, window, batches.read_shard)
        self._samples = iter(self._reader)
        self._count = 0  # batches

    def state_dict(self) -> State:
        return {"batches": self._count, **self._reader.state()}

    def load_state_dict(self, state: State) -> None:
        self._count = state["batches"]
        self._reader.restore(state)

    def __next__(self) -> Loaded | Exception:
        step = self._batches.base + self._worker + self._count * self._workers
        if step >= self._batches.total_steps:
            raise StopIteration
        try:
            return returning_errors(self._load, step)
        finally:
            self._count += 1

    def _load(self, step: int) -> Loaded:
        to = self._batches
        samples: list[Sample] = []
        bad: list[BadRecord] = []
        number, size = 0, to.reader.size
        buffer = BatchBuffer(to.batch_size, size) if size else None
        while len(samples) < to.batch_size and len(bad) < _MAX_BAD and not to.workers.closing:
            taken = next(self._samples)
            number = taken.at.number
            read = to.read(step, taken, buffer)
            if isinstance(read, Sample):
                samples.append(read)
            else:
                bad.append(read)
        if not samples:
            return step, {}, bad
        return step, seeded(to.collate, samples, to.order.seed, number, step), bad


class StreamLoader:
    """(step, batch, bad records) of steps ``first_step`` … ``total_steps - 1``, by iterating once.

    ``batch_size`` counts this rank's samples. ``saved`` are the states of all ranks that an earlier
    run ended with, as ``state`` gave them. ``greeting`` says in a line where the stream continues.
    Raises UserError where there are fewer shards than readers, FaultError when none of a batch's
    samples can be used or a worker dies.
    """

    def __init__(
        self,
        streams: Sequence[Stream],
        transform: Transform,
        collate: Collate,
        *,
        batch_size: int,
        first_step: int,
        total_steps: int,
        rank: int,
        world: int,
        seed: int,
        limits: Limits,
        num_workers: int | None = None,
        pin: bool = False,
        saved: Sequence[State] | None = None,
    ) -> None:
        shards = [(d, n) for d, stream in enumerate(streams) for n in range(len(stream.urls))]
        self._first, self._total = first_step, total_steps
        self._workers = _num_workers(num_workers, len(shards), world, saved)
        base, self._left, self._resumed = first_step, Remaining(), None
        what = f"streamed: {len(shards)} shards, {world} × {self._workers} processes × workers"
        more = "; a resume is exact on as many, and shows samples at least once on others"
        as_before = [each["workers"] == self._workers for each in saved or ()]
        if saved and len(saved) == world and all(as_before):
            mine = saved[rank]
            base, self._left, self._resumed = mine["base"], mine["left"], mine["loader"]
            more = "; resumed exactly where it stopped"
        elif saved:
            self._left = _remaining(saved, len(shards), seed)
            more = (
                f", {len(saved)} × {saved[0]['workers']} before; resumed at least once: shards "
                "that were not read to their end begin anew, and some samples come twice"
            )
        self.greeting = what + more
        self._batches = Batches(
            streams,
            shards,
            Order(len(shards), world * max(self._workers, 1), seed, self._left),
            Reader((), transform, seed, limits),
            collate,
            batch_size,
            rank,
            world,
            base,
            total_steps,
        )
        with warnings.catch_warnings():  # torchdata calls what torch has deprecated
            warnings.filterwarnings("ignore", "'set_vital' is deprecated")
            arguments = loader_options(self._batches.workers, self._workers, _PREFETCH, pin)
            self._loader = StatefulDataLoader(self._batches, **arguments)

    def __iter__(self) -> Iterator[Loaded]:
        if self._first >= self._total:
            return
        if self._resumed is not None:
            self._loader.load_state_dict(self._resumed)
        batches = None
        try:
            with self._batches.workers.running(self._loader) as batches:
                for expected in range(self._first, self._total):
                    yield _checked(next(batches), expected)
        finally:
            batches = None  # the last reference to it ends its workers
            self._loader._iterator = None

    def state(self) -> State:
        """This rank's state after the batch given last: JSON values alone."""
        own = {"workers": self._workers, "base": self._batches.base, "left": self._left}
        state = {**own, "loader": self._loader.state_dict()}
        plain: State = json.loads(json.dumps(state))
        if plain != state:
            raise FaultError("the stream's state holds something that JSON cannot hold")
        return plain


def _checked(loaded: Loaded | Exception, expected: int) -> Loaded:
    if isinstance(loaded, Exception):
        raise loaded
    step, batch, bad = loaded
    if step != expected:
        raise FaultError(f"the stream is at step {step}, the run at step {expected}")
    if not batch:
        raise FaultError(
            f"step {step}: none of {len(bad)} samples in a row can be used: {summary(bad)}"
        )
    return loaded


def _num_workers(asked: int | None, shards: int, world: int, saved: Sequence[State] | None) -> int:
    """Worker processes of a rank: as asked, else as saved, else what machine and shards allow."""
    most = shards // world
    if asked is None:
        if saved and len(saved) == world:
            return int(saved[0]["workers"])
        # Machines of one run may have unlike numbers of cores.
        asked = min(collectives.all_gather_json(min(default_workers(world), most)))
    if max(asked, 1) <= most:
        return asked
    readers = f"{world} processes" + (f" with data.num_workers {asked} each" if asked else "")
    raise UserError(
        f"{shards} streamed shards are too few for {readers}: every reader takes whole shards; "
        + (f"set data.num_workers to at most {most}" if most else f"start at most {shards}")
        + ", or cut the data into more shards",
        key="data.num_workers",
    )


def _remaining(saved: Sequence[State], shards: int, seed: int) -> Remaining:
    """What the readers of an earlier run have left, by torchdata's states with or without
    processes."""
    workers, cursors = max(saved[0]["workers"], 1), []
    for worker in range(workers):
        for loader in (state["loader"] for state in saved):
            if "_snapshot" in loader:
                loader = loader["_snapshot"]["_worker_snapshots"][f"worker_{worker}"]
            cursors.append(Cursor(*loader["fetcher_state"]["dataset_iter_state"]["begin"]))
    return Order(shards, len(cursors), seed, saved[0]["left"]).remaining(cursors)
