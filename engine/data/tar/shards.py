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
from typing import Any

import numpy as np
import pyarrow as pa

from engine.data.tables.source import File, Part, TableSource
from engine.data.tables.table import Table
from engine.data.tar.index import index_shard, open_summary
from engine.data.tar.texts import TextForm
from engine.errors import FaultError

_OPEN_INDEXES = 512  # some kilobytes each


class ShardTables:
    """The indexes of shards as the parts of a source; pickled as the summary's path."""

    def __init__(self, summary: Path, root: Path, form: TextForm) -> None:
        self.path, self.root, self.form = summary, root, form
        with pa.memory_map(str(summary)) as file:
            self._shards = pa.ipc.open_file(file).get_batch(0)
        self._opened = lru_cache(_OPEN_INDEXES)(self._open)

    def __getstate__(self) -> tuple[Path, Path, TextForm]:
        return self.path, self.root, self.form

    def __setstate__(self, state: tuple[Path, Path, TextForm]) -> None:
        self.__init__(*state)  # type: ignore[misc]

    @property
    def rows(self) -> np.ndarray:
        """int64 [shards]: rows of each shard."""
        return self._shards.column("rows").to_numpy()

    @property
    def faults(self) -> np.ndarray:
        """int64 [shards]: rows of each shard that are known to be lost."""
        return self._shards.column("faults").to_numpy()

    def __getitem__(self, number: int) -> Part:
        return self._opened(number)

    def _open(self, number: int) -> Part:
        shard, path = self._of(number, "shard"), Path(self._of(number, "index"))
        try:
            table = Table(path)
        except (OSError, ValueError):  # a cache that was emptied meanwhile, or torn by a power cut
            index_shard(Path(shard), path, self.form)
            table = Table(path)
        if len(table) != self._of(number, "rows"):
            raise FaultError(f"{path} is not the index that {self.path} counts on; delete both")
        file = File(shard, (self._of(number, "size"), self._of(number, "mtime")))
        return Part(table, [file], os.path.relpath(shard, self.root))

    def _of(self, number: int, column: str) -> Any:
        return self._shards.column(column)[number].as_py()


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
