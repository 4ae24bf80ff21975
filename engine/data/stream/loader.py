"""Streamed training data of one rank, and the state that goes on with it.

Every rank's worker processes read shards of their own and put whole batches together; torchdata's
StatefulDataLoader takes the workers' states along with their batches. A state says where a worker's
shuffle window began and how much of it was given out: a few integers. With as many ranks and
workers as before a stream goes on exactly there. With others, shards that were not read to their
end are read again from their beginning, so that nothing is lost and some samples come twice.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from torchdata.stateful_dataloader import StatefulDataLoader

from engine.data.bad_samples import summary
from engine.data.loader import Collate, Loaded, default_workers, loader_options
from engine.data.reader import Limits, Transform
from engine.data.stream.batches import Batches, Pool
from engine.data.stream.order import Left, Order, Place
from engine.data.stream.source import StreamSource
from engine.dist import collectives
from engine.errors import FaultError, UserError

State = dict[str, Any]
_PREFETCH = 2  # batches that each worker prepares ahead


class StreamLoader:
    """(step, batch, bad records) of steps ``first_step`` … ``total_steps - 1``, by iterating once.

    ``batch_size`` counts this rank's samples. ``saved`` are the states of all ranks that an earlier
    run ended with, as ``state`` gave them. ``greeting`` says in a line where the stream goes on.
    Raises UserError where there are fewer shards than readers, FaultError when none of a batch's
    samples can be used or a worker dies.
    """

    def __init__(
        self,
        sources: Sequence[StreamSource],
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
        pool = Pool(sources)
        self._first, self._total = first_step, total_steps
        self._workers = _num_workers(num_workers, len(pool), world, saved)
        readers = world * max(self._workers, 1)
        self._exact = _same(saved, world, self._workers)
        self._base, left = _continue(saved, self._exact, first_step, len(pool), seed)
        self._left = left
        self._mine = saved[rank] if saved and self._exact else None
        self.greeting = _greeting(len(pool), world, self._workers, saved, self._exact)
        self._batches = Batches(
            pool,
            Order(len(pool), readers, seed, left),
            transform,
            collate,
            batch_size=batch_size,
            rank=rank,
            world=world,
            base=self._base,
            total_steps=total_steps,
            limits=limits,
        )
        self._loader = _stateful(self._batches, self._workers, pin)

    def __iter__(self) -> Iterator[Loaded]:
        if self._first >= self._total:
            return
        if self._mine is not None:
            self._loader.load_state_dict(self._mine["loader"])
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
        state = {
            "workers": self._workers,
            "base": self._base,
            "left": self._left,
            "loader": self._loader.state_dict(),
        }
        plain: State = json.loads(json.dumps(state))
        if plain != state:
            raise FaultError("the stream's state holds something that JSON cannot say")
        return plain


def _stateful(batches: Batches, num_workers: int, pin: bool) -> StatefulDataLoader:
    with warnings.catch_warnings():  # torchdata calls what torch has deprecated
        warnings.filterwarnings("ignore", "'set_vital' is deprecated")
        options = loader_options(batches.workers, num_workers, _PREFETCH, pin)
        return StatefulDataLoader(batches, **options)


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


def _same(saved: Sequence[State] | None, world: int, workers: int) -> bool:
    return saved is None or (
        len(saved) == world and all(state["workers"] == workers for state in saved)
    )


def _continue(
    saved: Sequence[State] | None, exact: bool, step: int, shards: int, seed: int
) -> tuple[int, Left]:
    """Step of the readers' first batch, and what earlier readers have left to them."""
    if not saved:
        return step, {}
    if exact:
        return saved[0]["base"], saved[0]["left"]
    workers = max(saved[0]["workers"], 1)
    order = Order(shards, workers * len(saved), seed, saved[0]["left"])
    places = [_places(state["loader"], workers) for state in saved]
    return step, order.unfinished([mine[worker] for worker in range(workers) for mine in places])


def _places(loader: State, workers: int) -> list[Place]:
    """Where each worker's window began, from torchdata's state with or without processes."""
    states = [loader]
    if "_snapshot" in loader:
        snapshots = loader["_snapshot"]["_worker_snapshots"]
        states = [snapshots[f"worker_{worker}"] for worker in range(workers)]
    return [Place(*state["fetcher_state"]["dataset_iter_state"]["begin"]) for state in states]


def _greeting(
    shards: int, world: int, workers: int, saved: Sequence[State] | None, exact: bool
) -> str:
    now = f"{world} × {workers}"
    what = f"streamed: {shards} shards, {now} processes × workers"
    if saved is None:
        return f"{what}; a resume is exact on as many, and shows samples at least once on others"
    if exact:
        return f"{what}; resumed exactly where it stopped"
    before = f"{len(saved)} × {saved[0]['workers']}"
    return (
        f"{what}, {before} before; resumed at least once: shards that were not read to their end "
        "begin anew, and some samples come twice"
    )
