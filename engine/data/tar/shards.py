"""Tar shards on this machine's disks as one source, read by row through their indexes.

What a process holds grows by some bytes a shard and not with the number of samples: one summary
file for the whole dataset (shards, their states and rows), and the indexes and shards that were
read last, kept open.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import pyarrow as pa

from engine.data.tables.source import Part, Tables, TableSource
from engine.data.tables.table import Table
from engine.data.tar.index import index_shard, open_summary
from engine.data.tar.texts import TextForm
from engine.errors import FaultError

_OPEN_INDEXES = 512  # some kilobytes each


class ShardTables(Tables):
    """The indexes of shards; pickled as the summary's path."""

    def __init__(self, summary: Path, root: Path, form: TextForm) -> None:
        self.path, self.root, self.form = summary, root, form
        with pa.memory_map(str(summary)) as file:
            self._shards = pa.ipc.open_file(file).get_batch(0)
        self.rows, self.faults = (self._shards.column(n).to_numpy() for n in ("rows", "faults"))
        self._opened = lru_cache(_OPEN_INDEXES)(self._open)

    def __reduce__(self) -> tuple[type[ShardTables], tuple[Path, Path, TextForm]]:
        return ShardTables, (self.path, self.root, self.form)

    def __getitem__(self, number: int) -> Part:
        return self._opened(number)

    def _open(self, number: int) -> Part:
        found = self._shards.slice(number, 1).to_pylist()[0]
        shard, path = found["shard"], Path(found["index"])
        try:
            table = Table(path)
        except (OSError, ValueError):  # a cache that was emptied meanwhile, or torn by a power cut
            index_shard(Path(shard), path, self.form)
            table = Table(path)
        if len(table) != found["rows"]:
            raise FaultError(f"{path} is not the index that {self.path} counts on; delete both")
        file = shard, (found["size"], found["mtime"])
        return Part(table, [file], os.path.relpath(shard, self.root))


def open_shards(
    urls: Sequence[str],
    *,
    name: str,
    split: str,
    root: Path,
    cache_dir: Path,
    form: TextForm | None = None,
    key: str | None = None,
) -> TableSource:
    """The shards at local paths as one source; those that have no index are indexed first.

    Raises UserError, at ``key``, for shards that cannot be read or hold nothing to be used.
    """
    form = form or TextForm()
    shards = [Path(url) for url in urls]
    summary = open_summary(shards, form, name=name, cache_dir=cache_dir, key=key)
    parts = ShardTables(summary, root.absolute(), form)
    return TableSource(name, split, parts, sharded=True)
