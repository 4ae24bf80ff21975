"""A dataset of tar shards on this machine's disks, read by row through their indexes.

What a process holds grows by some bytes a shard and not with the number of samples: one summary
file for the whole dataset (shards, their states and rows), and the indexes and shards that were
read last, kept open.
"""

from __future__ import annotations

import os
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from engine.data.image_files import MAX_IMAGE_BYTES
from engine.data.once import make_once
from engine.data.tar import lengths
from engine.data.tar.build import index_shard, open_summary
from engine.data.tar.index import TarIndex
from engine.data.tar.recent import Recent
from engine.data.tar.samples import Row as IndexRow
from engine.data.tar.samples import parse_more
from engine.data.tar.texts import TextForm
from engine.errors import FaultError
from engine.types import BadSample, Row, Source, Turn

_OPEN_INDEXES = 512  # some kilobytes each
_OPEN_SHARDS = 64  # each takes one of a process's file descriptors
_CAPTIONS = 8192  # in memory at once


class _Shard:
    """An open shard; closed when the last user lets go of it."""

    def __init__(self, path: str) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


class _Index(NamedTuple):
    """The rows of a shard, the number of the first in the dataset, and the shard's name."""

    rows: TarIndex
    start: int
    shown: str

    def gives(self, name: str) -> bool:
        """Whether any sample has an id of its own."""
        return bool(pc.any(pc.not_equal(self.rows.batch.column(name), "")).as_py())

    def ids(self, name: str) -> pa.Array:
        """The ids of all rows, as their records have them."""
        own = self.rows.batch.column(name)
        if name == "caption_id":
            made = pa.array(np.arange(self.start, self.start + len(own)))
            return pc.if_else(pc.equal(own, ""), made.cast(pa.large_string()), own)
        text = pa.large_string()
        keys, offsets = (self.rows.batch.column(column) for column in ("key", "offset"))
        before, between, nothing = (pa.scalar(part, text) for part in (f"{self.shown}/", "@", ""))
        made = pc.binary_join_element_wise(before, keys, between, offsets.cast(text), nothing)
        return pc.if_else(pc.equal(own, ""), made, own)

    def labels(self) -> np.ndarray:
        """int64 [rows]: the number of each row's class, -1 for none."""
        labels = (parse_more(more).label for more in self.rows.batch.column("more").to_pylist())
        return np.fromiter((-1 if label is None else label for label in labels), np.int64)

    def new_images(self) -> np.ndarray:
        """bool [rows]: where a row's image is not that of the row before."""
        offsets = self.rows.batch.column("offset").to_numpy()
        return np.append(True, (offsets[1:] != offsets[:-1]) | (offsets[1:] < 0))


class ShardSource(Source):
    """Rows of one split's shards, in the order of the shards and of the samples in them.

    What is damaged or lost is a row too, whose reading raises BadSample. An image_id or caption_id
    that a sample does not give is made from its place.
    """

    def __init__(self, name: str, split: str, summary: Path, root: Path, form: TextForm) -> None:
        self.name, self.split = name, split
        self.summary, self.root, self.form = summary, root, form
        self._open()

    def _open(self) -> None:
        with pa.memory_map(str(self.summary)) as file:
            self._shards = pa.ipc.open_file(file).get_batch(0)
        self._ends = array("q", np.cumsum(self.blocks).tolist())
        self.indexes = Recent(self._open_index, _OPEN_INDEXES)
        self._files = Recent(self._open_shard, _OPEN_SHARDS)

    def __getstate__(self) -> tuple[Any, ...]:
        return self.name, self.split, self.summary, self.root, self.form

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.name, self.split, self.summary, self.root, self.form = state
        self._open()

    @property
    def blocks(self) -> np.ndarray:
        """int64 [shards]: rows of each shard; a block is read fastest as a whole."""
        return self._shards.column("rows").to_numpy()

    @property
    def faults(self) -> np.ndarray:
        """int64 [shards]: rows of each shard that are known to be lost."""
        return self._shards.column("faults").to_numpy()

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Row:
        """The row at ``index`` with its image's bytes; BadSample for one that is lost."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)} in {self.name}")
        shard = bisect_right(self._ends, index)
        opened = self.indexes[shard]
        row = opened.rows[index - opened.start]
        place = f"{opened.shown}/{row.key}"
        if row.cause:
            raise BadSample(row.cause, f"{place.rstrip('/')}: {row.detail}")
        return Row(
            f"{place}.{row.image}" if row.image else place,
            (self._image(shard, row, place),) if row.image else (),
            row.caption,
            row.image_id or f"{place}@{row.offset}",
            row.caption_id or str(index),
            **parse_more(row.more)._asdict(),
        )

    def _image(self, shard: int, row: IndexRow, place: str) -> bytes:
        if row.size > MAX_IMAGE_BYTES:
            raise BadSample("too large", f"{place}.{row.image} has {row.size} bytes")
        try:
            file = self._files[shard]
            data = os.pread(file.descriptor, row.size, row.offset)
        except FileNotFoundError as error:
            raise BadSample("missing", f"{place}: {error.filename} is gone") from error
        except OSError as error:
            raise BadSample("unreadable", f"{place}: {error}") from error
        if len(data) < row.size:
            raise BadSample("truncated shard", f"{place}: {len(data)} of {row.size} bytes are left")
        return data

    def _open_shard(self, shard: int) -> _Shard:
        opened = _Shard(self._of(shard, "shard"))
        stat = os.fstat(opened.descriptor)
        if (stat.st_size, stat.st_mtime_ns) != (self._of(shard, "size"), self._of(shard, "mtime")):
            shown = self._shown(shard)
            raise BadSample("changed shard", f"{shown} is not what was indexed; start again")
        return opened

    def _open_index(self, shard: int) -> _Index:
        path = Path(self._of(shard, "index"))
        try:
            rows = TarIndex(path)
        except (OSError, ValueError):  # a cache that was emptied meanwhile, or torn by a power cut
            index_shard(Path(self._of(shard, "shard")), path, self.form)
            rows = TarIndex(path)
        if len(rows) != self._of(shard, "rows"):
            raise FaultError(f"{path} is not the index that {self.summary} counts on; delete both")
        return _Index(rows, self._ends[shard] - len(rows), self._shown(shard))

    def _of(self, shard: int, column: str) -> Any:
        return self._shards.column(column)[shard].as_py()

    def _shown(self, shard: int) -> str:
        """A shard's name in messages and ids: its path as seen from the dataset's folder."""
        return os.path.relpath(self._of(shard, "shard"), self.root)

    def column(self, name: str) -> np.ndarray:
        """int64 [rows], memory-mapped: ``label`` (-1 for none), or codes of ``image_id`` and
        ``caption_id``, equal where the ids are; or one of engine/data/tar/lengths.py."""
        path = self.summary.with_name(f"{self.summary.name}.{name}.npy")
        try:
            make_once(path, lambda temporary: _save(self._codes(name), temporary))
        except OSError:  # a cache that another user made and this one may only read
            return self._codes(name)
        return np.load(path, mmap_mode="r")

    def _codes(self, name: str) -> np.ndarray:
        numbers = range(len(self._ends))
        if name in lengths.COLUMNS:
            return lengths.COLUMNS[name](self.indexes[shard].rows for shard in numbers)
        if name == "label":
            return np.concatenate([self.indexes[shard].labels() for shard in numbers])
        if any(self.indexes[shard].gives(name) for shard in numbers):
            ids = pa.chunked_array([self.indexes[shard].ids(name) for shard in numbers])
            chunks = ids.dictionary_encode().chunks
            return np.concatenate([chunk.indices.to_numpy() for chunk in chunks]).astype(np.int64)
        if name == "caption_id":
            return np.arange(len(self))
        return np.cumsum(np.concatenate([self.indexes[n].new_images() for n in numbers])) - 1

    @property
    def has_conversations(self) -> bool:
        """Whether any row has turns."""
        return any(lengths.has_turns(self.indexes[n].rows) for n in range(len(self._ends)))

    def conversations(self) -> Iterator[tuple[Turn, ...]]:
        """The turns of all rows in order, none of most."""
        shards = range(len(self._ends))
        return chain.from_iterable(lengths.conversations(self.indexes[n].rows) for n in shards)

    def captions(self) -> Iterator[str]:
        """All captions in order, without their images; empty ones for rows that are lost."""
        for shard in range(len(self._ends)):
            captions = self.indexes[shard].rows.batch.column("caption")
            for start in range(0, len(captions), _CAPTIONS):
                yield from captions.slice(start, _CAPTIONS).to_pylist()


def _save(codes: np.ndarray, target: Path) -> None:
    with target.open("wb") as file:
        np.save(file, codes)


def open_shards(
    urls: Sequence[str],
    *,
    name: str,
    split: str,
    root: Path,
    cache_dir: Path,
    form: TextForm | None = None,
    key: str | None = None,
) -> ShardSource:
    """The shards at local paths as one source; those that have no index are indexed first.

    Raises UserError, at ``key``, for shards that cannot be read or hold nothing to be used.
    """
    form = form or TextForm()
    shards = [Path(url) for url in urls]
    summary = open_summary(shards, form, name=name, cache_dir=cache_dir, key=key)
    return ShardSource(name, split, summary, root.absolute(), form)
