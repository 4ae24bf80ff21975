"""From a sampler's rows to collated batches, in worker processes.

One torch DataLoader serves a whole run: its indices are step numbers, and each worker computes a
step's rows itself from the sampler. A batch is therefore a pure function of (seed, step,
rank, world), whatever the number of workers, and a resume begins at its step at once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from engine.data.bad_samples import BadRecord, summary
from engine.data.batch_memory import BatchBuffer
from engine.data.permutation import Indices, hash64
from engine.data.reader import Fetched, Limits, Reader, Transform
from engine.data.samplers.pool import Sampler
from engine.data.workers import Item, Workers
from engine.errors import FaultError, UserError
from engine.types import Batch, Sample, Source

Loaded = tuple[int, Batch, list[BadRecord]]
Collate = Callable[[list[Sample]], Batch]
Blank = Callable[[Batch], Batch | None]

_FETCHED = 8  # rows read at once, whose encoded images are in memory together
_LARGE_BATCH = 512  # rows; of larger batches each worker prepares one ahead, not two


def default_workers(world: int) -> int:
    """Worker processes for each rank: this machine's cores shared among its ranks, at most 8."""
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    bound = getattr(os, "sched_getaffinity", None)  # absent outside Linux
    cores = len(bound(0)) if bound else os.cpu_count() or 1
    return min(8, cores // ranks_here)


def rank_slice(batch: Any, rank: int, world: int) -> Any:
    """A rank's contiguous share of a sequence; the first n % world ranks get one item more."""
    share, more = divmod(len(batch), world)
    first = rank * share + min(rank, more)
    return batch[first : first + share + (rank < more)]


class _Steps(Dataset):
    """Step number → (step, collated batch, bad records), or the error that ends the run.

    ``batch_of`` gives a step's epoch and (dataset, row) of all ranks; see ``train_batches``.
    """

    def __init__(
        self,
        reader: Reader,
        collate: Collate,
        batch_of: Callable[[int], tuple[int, Indices]],
        rank: int = 0,
        world: int = 1,
        blank: Blank | None = None,
    ) -> None:
        self.reader, self.collate, self.batch_of, self.blank = reader, collate, batch_of, blank
        self.rank, self.world = rank, world
        self.workers = Workers()

    def __getitem__(self, step: int) -> Loaded | Exception:
        return returning_errors(self._load, step)

    def _load(self, step: int) -> Loaded:
        epoch, batch = self.batch_of(step)
        rows = rank_slice(batch, self.rank, self.world)
        samples: list[Sample] = []
        bad: list[BadRecord] = []
        size = self.reader.size
        buffer = BatchBuffer(len(rows), size) if size else None
        for fetched in self._fetched(step, epoch, rows):
            if self.workers.closing:
                break
            read = self.reader.decode(fetched, buffer)
            if isinstance(read, Sample):
                samples.append(read)
            else:
                bad.append(read)
        if not samples:
            return step, self._stand_in(step, epoch, batch), bad
        return step, seeded(self.collate, samples, self.reader.seed or 0, epoch, step), bad

    def _stand_in(self, step: int, epoch: int, batch: Indices) -> Batch:
        """A batch of another rank's row that teaches nothing, since all ranks wait for each other's
        passes; {} where no other has a sample, or ranks without one cannot take part."""
        if self.blank is None:
            return {}
        own = rank_slice(np.arange(len(batch)), self.rank, self.world)
        for dataset, row in np.delete(batch, own, axis=0).tolist():
            read = self.reader.read(step, epoch, dataset, row)
            if isinstance(read, Sample):
                place = self.reader.seed or 0, epoch, step
                return self.blank(seeded(self.collate, [read], *place)) or {}
        return {}

    def _fetched(self, step: int, epoch: int, rows: Indices) -> Iterator[Fetched | BadRecord]:
        """The rows a few at a time: the code that reads is slow right after an image was decoded,
        since it is no longer in the processor's caches."""
        for first in range(0, len(rows), _FETCHED):
            places = rows[first : first + _FETCHED].tolist()
            yield from [self.reader.fetch(step, epoch, dataset, row) for dataset, row in places]


def seeded(collate: Collate, samples: list[Sample], *place: int) -> Batch:
    """The batch of the samples at ``place``, from (seed, epoch, step).

    Random choices of the collate come from torch's global generator, which the caller restores:
    repeatable, and unlike those of other ranks.
    """
    first = samples[0]
    torch.default_generator.manual_seed(hash64(*place, first.dataset, first.index, 1))
    return collate(samples)


def returning_errors(load: Callable[[int], Item], step: int) -> Item | Exception:
    """``load(step)``, or the error that ends the run, for the caller to raise.

    Raised here, an exception would lose its type and text on the way out of a worker.
    """
    # The caller's random state is the model's; this process may be the caller's.
    state = torch.get_rng_state()
    try:
        return load(step)
    except (UserError, FaultError) as error:
        return error
    finally:
        torch.set_rng_state(state)


def loader_options(workers: Workers, num_workers: int, prefetch: int, pin: bool) -> dict[str, Any]:
    """Of a torch DataLoader whose dataset gives whole batches."""
    return {
        "batch_size": None,
        "num_workers": num_workers,
        "collate_fn": _unchanged,
        "pin_memory": pin,
        "worker_init_fn": workers.start,
        "prefetch_factor": prefetch if num_workers else None,
        "generator": torch.Generator().manual_seed(0),  # else drawn from the global one
    }


def _unchanged(loaded: Item) -> Item:
    return loaded


def _stream(
    steps: _Steps, numbers: range, world: int, num_workers: int | None, prefetch: int, pin: bool
) -> Iterator[Loaded]:
    """The steps of ``numbers`` in order. Raises what a worker returned as an error."""
    num_workers = default_workers(world) if num_workers is None else num_workers
    options = loader_options(steps.workers, min(num_workers, len(numbers)), prefetch, pin)
    with steps.workers.running(DataLoader(steps, sampler=numbers, **options)) as batches:
        for loaded in batches:
            if isinstance(loaded, Exception):
                raise loaded
            yield loaded


def train_batches(
    sources: Sequence[Source],
    sampler: Sampler,
    transform: Transform,
    collate: Collate,
    *,
    first_step: int,
    total_steps: int,
    steps_per_epoch: int,
    rank: int,
    world: int,
    seed: int,
    num_workers: int | None = None,
    pin: bool = False,
    limits: Limits = Limits(),  # noqa: B008  frozen
    blank: Blank | None = None,
) -> Iterator[Loaded]:
    """(step, batch, bad records) of this rank for steps ``first_step`` … ``total_steps - 1``.

    A bad sample is left out of its batch. A rank that has none left takes part with another rank's
    by ``blank``, which makes a batch that teaches nothing, or None where it cannot. Raises
    UserError for batches with fewer samples than ranks, FaultError when none of a step's samples
    can be used, without ``blank`` none of a rank's, or a worker dies.
    """
    last = len(sampler.batch(0, steps_per_epoch - 1))  # no batch of an epoch is smaller
    if last < world:
        raise UserError(
            f"data.batch_size leaves {last} samples in an epoch's last batch for {world} processes;"
            f" set a batch of at least {2 * world}",
            key="data.batch_size",
        )
    batch_of = partial(_train_batch, sampler, steps_per_epoch)
    reader = Reader(sources, transform, seed, limits)
    steps = _Steps(reader, collate, batch_of, rank, world, blank)
    prefetch = 2 if last // world <= _LARGE_BATCH else 1
    numbers = range(first_step, total_steps)
    for step, batch, bad in _stream(steps, numbers, world, num_workers, prefetch, pin):
        if not batch:
            raise FaultError(
                f"step {step}: none of this process's {len(bad)} samples can be used: "
                f"{summary(bad)}; correct them or set a larger data.batch_size"
            )
        yield step, batch, bad


def _train_batch(sampler: Sampler, steps_per_epoch: int, step: int) -> tuple[int, Indices]:
    epoch, within = divmod(step, steps_per_epoch)
    return epoch, sampler.batch(epoch, within)


def valid_batches(
    source: Source,
    rows: Indices,
    transform: Transform,
    collate: Collate,
    *,
    batch_size: int,
    dataset: int = 0,
    rank: int = 0,
    world: int = 1,
    num_workers: int | None = None,
    pin: bool = False,
    limits: Limits = Limits(),  # noqa: B008  frozen
) -> Iterator[Loaded]:
    """(number, batch, bad records) over this rank's share of ``rows``, each once, none padded.

    ``batch_size`` counts all ranks' samples. A batch of which no sample can be used is ``{}``; a
    rank without rows yields nothing. Random transforms and collates repeat from call to call.
    """
    mine = rank_slice(np.asarray(rows, np.int64), rank, world)
    size = -(-batch_size // world)
    reader = Reader({dataset: source}, transform, None, limits)
    steps = _Steps(reader, collate, partial(_valid_batch, mine, dataset, size))
    yield from _stream(steps, range(-(-len(mine) // size)), world, num_workers, 2, pin)


def _valid_batch(rows: Indices, dataset: int, size: int, number: int) -> tuple[int, Indices]:
    rows = rows[number * size : (number + 1) * size]
    return 0, np.stack((np.full_like(rows, dataset), rows), axis=1)
