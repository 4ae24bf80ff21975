"""The index of a tar shard: one pass finds every sample, and from then on each is read by itself.

An index is a table of the shard's rows, memory-mapped by all processes of a machine. It is kept in
``.engine_cache`` beside its shard, or in a cache folder where that cannot be written, and is named
by the shard's state: size, time of change, and the check sum of its first header. A shard that
changes gets a new one. A dataset's shards are listed in a summary, with their states, rows and
faults; shards that have no index are indexed in parallel.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import re
import stat
import sys
import uuid
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import astuple
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from engine.data.cache import NAME_LENGTH, build_cached, cache_folder, digest
from engine.data.tables.table import FORM, SCHEMA, Table, write_table
from engine.data.tar.samples import Plain, read_samples
from engine.data.tar.texts import TextForm
from engine.data.tar.walk import BLOCK
from engine.errors import FaultError, UserError
from engine.types import Place, Row

SUMMARY = pa.schema(
    [("shard", pa.string()), ("index", pa.string())]
    + [(name, pa.int64()) for name in ("size", "mtime", "rows", "faults")]
)
_NUM_NAMED = 5
_THREADS = 16  # that ask for the states of shards: files on a network answer late
_SHARDS_A_PROCESS = 4  # fewer are indexed sooner than a process starts


class State(NamedTuple):
    """What a shard's index depends on."""

    size: int
    mtime_ns: int
    first: int  # CRC-32 of its first header

    def __str__(self) -> str:
        return f"{self.size}-{self.mtime_ns}-{self.first:08x}"


class Job(NamedTuple):
    """A shard to index into ``target``."""

    shard: Path
    state: State
    target: Path


def open_summary(
    shards: Sequence[Path], form: TextForm, *, name: str, cache_dir: Path, key: str | None = None
) -> Path:
    """The summary file of a dataset's shards, which are indexed first where they are not.

    However many processes ask for it, one makes it. Raises UserError for shards that are missing
    or not files, for folders that cannot be written, and where no sample can be used.
    """
    states = _states(shards, key)
    kind = digest(FORM, astuple(form))
    stem = f"{digest([str(shard.absolute()) for shard in shards])}.{kind}"
    summary = _target(shards[0], f"{stem}.{digest(list(map(str, states)))}.shards", cache_dir)
    try:
        if not summary.exists():
            jobs = []
            for shard, state in zip(shards, states, strict=True):
                file_name = f"{shard.name[:NAME_LENGTH]}.{kind}.{state}.index"
                jobs.append(Job(shard, state, _target(shard, file_name, cache_dir)))
            build_cached(summary, lambda target: _summarise(jobs, form, name, key, target))
            _remove_stale({job.target for job in jobs}, summary, stem)
    except OSError as error:
        raise UserError(f"cannot index the shards of {name!r}: {error}", key=key) from error
    return summary


def index_shard(shard: Path, target: Path, form: TextForm) -> None:
    """Write a shard's index; it gets its name when it is whole. Raises OSError."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.making-{uuid.uuid4().hex}")
    try:
        write_index(shard, temporary, form)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def write_index(shard: Path, target: Path, form: TextForm) -> None:
    """Index a shard into a table. Raises OSError where either cannot be opened."""
    collecting = gc.isenabled()
    gc.disable()  # thousands of small objects without a cycle; looking for one is a tenth of it all
    try:
        with shard.open("rb", buffering=0) as file:
            rows = read_samples(file.fileno(), os.fstat(file.fileno()).st_size, form)
    finally:
        if collecting:
            gc.enable()
    rows += _missing(shard, rows)
    if not rows:
        what = "no member ends in .jpg, .png, … after its first dot"
        rows = [Row(cause="empty shard", detail=what)]
    write_table(target, [_to_batch(rows)])


def _to_batch(rows: list[Plain | Row]) -> pa.RecordBatch:
    """One record batch, without the columns in which no row has a value."""
    others = [(number, row) for number, row in enumerate(rows) if isinstance(row, Row)]
    plain = map(_as_plain, rows) if others else rows
    keys, offsets, sizes, captions = zip(*plain, strict=True)
    places = {"offset": np.array(offsets), "size": np.array(sizes)}
    shown = places["offset"] >= 0
    ends = pa.array(np.cumsum(np.append(0, shown), dtype=np.int32))
    images = pa.StructArray.from_arrays(
        [pa.array(values[shown]) for values in places.values()], names=list(places)
    )
    columns = {
        "key": pa.array(keys, pa.large_string()),
        "images": pa.ListArray.from_arrays(ends, images),
        "caption": pa.array(captions, pa.large_string()),
    }
    for field in SCHEMA:
        values: list[Any] = [None] * len(rows)
        for number, row in others:
            value = getattr(row, field.name)
            values[number] = None if value in ("", ()) else value
        if field.name not in columns and any(value is not None for value in values):
            columns[field.name] = pa.array(values, _wide(field.type))
    return pa.record_batch(columns)


def _as_plain(row: Plain | Row) -> Plain:
    if isinstance(row, Plain):
        return row
    image = row.images[0] if row.images else Place("", -1, 0)
    assert isinstance(image, Place)
    return Plain(row.key, image.offset, image.size, row.caption)


def _wide(kind: pa.DataType) -> pa.DataType:
    """With offsets of 64 bits: the texts of one shard may take more than 2 GiB."""
    if pa.types.is_string(kind):
        return pa.large_string()
    if pa.types.is_list(kind):
        return pa.large_list(_wide(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([(field.name, _wide(field.type)) for field in kind])
    return kind


def _missing(shard: Path, rows: list[Plain | Row]) -> list[Row]:
    """A row where img2dataset counted more samples than the shard has."""
    stats = shard.with_name(f"{shard.stem}_stats.json")
    try:
        counted = json.loads(stats.read_bytes())["successes"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return []
    found = len({image.offset for image in map(_as_plain, rows) if image.offset >= 0})
    if not isinstance(counted, int) or counted <= found:
        return []
    detail = f"{counted - found} of the {counted} that {stats.name} counts"
    return [Row(cause="missing samples", detail=detail)]


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
    """The state of a shard, or why it cannot be read."""
    try:
        found = shard.stat()
        if not stat.S_ISREG(found.st_mode):  # opening a pipe would wait for its writer
            return f"{shard}: not a file"
        with shard.open("rb", buffering=0) as file:
            return State(found.st_size, found.st_mtime_ns, zlib.crc32(file.read(BLOCK)))
    except (OSError, ValueError) as error:
        return f"{shard}: {getattr(error, 'strerror', None) or error}"


def _target(shard: Path, name: str, cache_dir: Path) -> Path:
    """Beside the shard, also where another user put the file there and nothing can be written."""
    beside = shard.parent / ".engine_cache" / name
    return beside if beside.exists() else cache_folder(shard, cache_dir) / name


def _summarise(jobs: list[Job], form: TextForm, name: str, key: str | None, target: Path) -> None:
    counts = []
    for done, count in enumerate(_indexed(jobs, form), 1):
        counts.append(count)
        if sys.stderr.isatty():
            end = "\n" if done == len(jobs) else ""
            print(f"\rindexing {name}: {done} of {len(jobs)} shards", end=end, file=sys.stderr)
    rows, faults = zip(*counts, strict=True)
    if sum(rows) == sum(faults):
        read = Table(jobs[0].target).at(0)[0].read
        first = f"{read['key'](0) or ''} {read['cause'](0)}, {read['detail'](0)}"
        raise UserError(
            f"dataset {name!r} has {len(jobs)} shards and no sample that can be used; the first of "
            f"{jobs[0].shard}: {first}",
            key=key,
        )
    shards = [str(job.shard.absolute()) for job in jobs]
    indexes = [str(job.target.absolute()) for job in jobs]
    sizes, times, _ = zip(*(job.state for job in jobs), strict=True)
    columns = [pa.array(values) for values in (shards, indexes, sizes, times, rows, faults)]
    write_table(target, [pa.record_batch(columns, schema=SUMMARY)])


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
        index = Table(job.target)
    except (OSError, ValueError):  # none yet, or one torn by a power cut
        index_shard(job.shard, job.target, form)
        index = Table(job.target)
    return len(index), index.num_faults


def _remove_stale(indexes: set[Path], summary: Path, stem: str) -> None:
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
    for old in summary.parent.glob(f"{stem}.*"):
        if not old.name.startswith(summary.name):
            old.unlink(missing_ok=True)
