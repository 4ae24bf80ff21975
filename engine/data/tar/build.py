"""Indexes of many shards: which are there, which are stale, and making the others in parallel."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import re
import stat
import sys
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import astuple
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from engine.data.once import make_once
from engine.data.tables.table import cache_folder
from engine.data.tar.index import FORM, State, TarIndex, state_of, write_index
from engine.data.tar.texts import TextForm
from engine.errors import FaultError, UserError

SUMMARY = pa.schema(
    [("shard", pa.string()), ("index", pa.string())]
    + [(name, pa.int64()) for name in ("size", "mtime", "rows", "faults")]
)
_NUM_NAMED = 5
_NAME_LENGTH = 100  # of a shard's name in the name of its index
_THREADS = 16  # that ask for the states of shards: files on a network answer late
_SHARDS_A_PROCESS = 4  # fewer are indexed sooner than a process starts


class Job(NamedTuple):
    """A shard to index, and where to."""

    shard: Path
    state: State
    target: Path


def open_summary(
    shards: Sequence[Path], form: TextForm, *, name: str, cache_dir: Path, key: str | None = None
) -> Path:
    """The summary file of a dataset's shards, which are indexed first where they are not.

    However many processes ask for it, one makes it. Raises UserError for shards that are missing
    or no files, for folders that cannot be written, and where no sample can be used.
    """
    states = _states(shards, key)
    kind = _digest(FORM, astuple(form))
    stem = f"{_digest([str(shard.absolute()) for shard in shards])}.{kind}"
    file_name = f"{stem}.{_digest(list(map(str, states)))}.shards"
    folder = _folder(shards[0], file_name, cache_dir)
    try:
        if not (folder / file_name).exists():
            jobs = [
                Job(shard, state, _index_path(shard, state, kind, cache_dir))
                for shard, state in zip(shards, states, strict=True)
            ]
            make_once(folder / file_name, lambda target: _summarise(jobs, form, name, key, target))
            _remove_stale({job.target for job in jobs}, folder, stem, file_name)
    except OSError as error:
        raise UserError(f"cannot index the shards of {name!r}: {error}", key=key) from error
    return folder / file_name


def index_shard(shard: Path, target: Path, form: TextForm) -> None:
    """Write a shard's index; it gets its name when it is whole. Raises OSError."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.making-{uuid.uuid4().hex}")
    try:
        write_index(shard, temporary, form)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def _states(shards: Sequence[Path], key: str | None) -> list[State]:
    """Every shard's state. Raises UserError naming those that cannot be read."""
    with ThreadPoolExecutor(_THREADS) as pool:
        found = list(pool.map(_state, shards))
    bad = [state for state in found if isinstance(state, str)]
    if bad:
        more = f"\n  … and {len(bad) - _NUM_NAMED} more" if len(bad) > _NUM_NAMED else ""
        raise UserError(
            f"{len(bad)} of {len(shards)} shards cannot be read:\n  "
            + "\n  ".join(bad[:_NUM_NAMED])
            + more,
            key=key,
        )
    return [state for state in found if isinstance(state, State)]


def _state(shard: Path) -> State | str:
    try:
        if not stat.S_ISREG(shard.stat().st_mode):  # opening a pipe would wait for its writer
            return f"{shard}: not a file"
        descriptor = os.open(shard, os.O_RDONLY)
    except (OSError, ValueError) as error:
        return f"{shard}: {getattr(error, 'strerror', None) or error}"
    try:
        return state_of(descriptor)
    finally:
        os.close(descriptor)


def _digest(*values: object) -> str:
    return hashlib.blake2b(repr(values).encode(), digest_size=8).hexdigest()


def _folder(shard: Path, file_name: str, cache_dir: Path) -> Path:
    """Beside the shard, also where another user put the file there and nothing can be written."""
    beside = shard.parent / ".engine_cache"
    return beside if (beside / file_name).exists() else cache_folder(shard, cache_dir)


def _index_path(shard: Path, state: State, kind: str, cache_dir: Path) -> Path:
    file_name = f"{shard.name[:_NAME_LENGTH]}.{kind}.{state}.index"
    return _folder(shard, file_name, cache_dir) / file_name


def _summarise(jobs: list[Job], form: TextForm, name: str, key: str | None, target: Path) -> None:
    counts = []
    for done, count in enumerate(_indexed(jobs, form), 1):
        counts.append(count)
        if sys.stderr.isatty():
            end = "\n" if done == len(jobs) else ""
            print(f"\rindexing {name}: {done} of {len(jobs)} shards", end=end, file=sys.stderr)
    rows, faults = zip(*counts, strict=True)
    if sum(rows) == sum(faults):
        first = TarIndex(jobs[0].target)[0]
        raise UserError(
            f"dataset {name!r} has {len(jobs)} shards and no sample that can be used; the first of "
            f"{jobs[0].shard}: {first.key} {first.cause}, {first.detail}",
            key=key,
        )
    shards = [str(job.shard.absolute()) for job in jobs]
    indexes = [str(job.target.absolute()) for job in jobs]
    sizes, times, _ = zip(*(job.state for job in jobs), strict=True)
    columns = [pa.array(values) for values in (shards, indexes, sizes, times, rows, faults)]
    with pa.OSFile(str(target), "wb") as file, pa.ipc.new_file(file, SUMMARY) as writer:
        writer.write_batch(pa.record_batch(columns, schema=SUMMARY))


def _indexed(jobs: list[Job], form: TextForm) -> Iterator[tuple[int, int]]:
    """Rows of each shard and how many of them are lost, in order, made by several processes."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    processes = min(cores or 1, len(jobs) // _SHARDS_A_PROCESS)
    if processes < 2 or multiprocessing.current_process().daemon:  # which may have no children
        yield from (_count(job, form) for job in jobs)
        return
    with ProcessPoolExecutor(processes) as pool:
        try:
            yield from pool.map(_count, jobs, [form] * len(jobs), chunksize=_SHARDS_A_PROCESS)
        except BrokenProcessPool as error:
            raise FaultError("a process that indexed shards was killed; did memory run out?") from (
                error
            )


def _count(job: Job, form: TextForm) -> tuple[int, int]:
    """Rows of a shard and lost ones among them, from its index, made now if it is not there."""
    try:
        index = TarIndex(job.target)
    except (OSError, ValueError):  # none yet, or one torn by a power cut
        index_shard(job.shard, job.target, form)
        index = TarIndex(job.target)
    return len(index), index.num_faults


def _remove_stale(indexes: set[Path], folder: Path, stem: str, file_name: str) -> None:
    """Remove what was made for former states; processes that mapped it keep its pages."""
    state = re.compile(r"\.\d+-\d+-[0-9a-f]{8}\.index$")
    kept: dict[Path, set[str]] = {}
    for index in indexes:
        kept.setdefault(index.parent, set()).add(index.name)
    for place, names in kept.items():
        shards = {state.sub("", own) for own in names}  # and how their texts are read
        for old in place.iterdir():
            if old.name not in names and state.sub("", old.name) in shards - {old.name}:
                old.unlink(missing_ok=True)
    for old in folder.iterdir():
        if old.name.startswith(f"{stem}.") and not old.name.startswith(file_name):
            old.unlink(missing_ok=True)
