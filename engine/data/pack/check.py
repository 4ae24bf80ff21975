"""What was packed, read as a run would read it, and compared with what it was packed from."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import add
from typing import Any, Literal

from rich.console import Console

from engine.config.schema import Data
from engine.data.image_files import read_bytes
from engine.data.pack.digest import Digest, image_digest, sample_digest
from engine.data.pack.plan import Plan
from engine.data.pack.shards import Shard
from engine.data.sources import open_source
from engine.errors import FaultError
from engine.tools import jobs
from engine.types import BadSample, Source


def read_back(plan: Plan, shards: Sequence[Shard], num_jobs: int, console: Console) -> Digest:
    """The digest of DEST, read as a run reads it. Raises FaultError, naming the shard, where it is
    not that of the source."""
    split: Literal["train", "valid"] = "valid" if plan.split == "valid" else "train"
    packed = open_source(plan.source.name, split, _packed_data(plan), key=f"packed {plan.dest}")
    total = sum(shard.samples for shard in shards)
    if len(packed) != total:
        raise FaultError(f"{plan.dest} has {len(packed):,} samples where {total:,} were written")
    items, first = [], 0
    for shard in shards:
        items.append((first, shard.digest, str(plan.content(shard.number))))
        first += shard.samples
    with jobs.progress_bar(f"checking {plan.split}", total, console) as tick:
        read: dict[int, Digest] = dict(jobs.each(_check, packed, items, jobs=num_jobs, tick=tick))
    return reduce(add, (read[start] for start in sorted(read)), Digest())


def _check(packed: Source, item: tuple[int, Digest, str], tick: jobs.Tick) -> tuple[int, Digest]:
    first, expected, named = item
    digest = Digest()
    for row in range(first, first + expected.length):
        try:
            record = packed[row]
            image = b"" if record.image is None else image_digest(read_bytes(record.image))
        except BadSample as bad:
            raise FaultError(
                f"{named}: sample {row - first + 1} cannot be read back: {bad}"
            ) from None
        digest += sample_digest(record, image)
        tick(1)
    if digest != expected:
        raise FaultError(
            f"{named} does not hold what was read from the source: digest {digest}, expected "
            f"{expected}; remove it and pack again"
        )
    return first, digest


def _packed_data(plan: Plan) -> Data:
    options: dict[str, Any] = {"format": plan.to, "root": str(plan.dest.absolute())}
    return Data(data_path=str(plan.dest.parent), datasets={plan.source.name: options})
