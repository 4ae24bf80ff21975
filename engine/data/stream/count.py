"""How many samples remote shards hold, and copies of those that are small enough to be kept."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from engine.data.once import make_once
from engine.data.stream.open import open_shard
from engine.data.stream.shard import WHOLE_SHARD, Item
from engine.data.tar.urls import is_remote
from engine.errors import UserError
from engine.logs.progress import Progress
from engine.types import BadSample

_THREADS = 8  # shards at once
_CHUNK = 1 << 20  # bytes
_MAX_STATISTICS = 1 << 20  # bytes of a _stats.json


def count_samples(
    urls: Sequence[str], read: Callable[[str], Any], *, name: str, cache_dir: Path
) -> int:
    """Samples in all shards: as img2dataset's ``_stats.json`` say, else counted by one pass.

    ``read`` yields the items of a shard. The number is kept in ``cache_dir``. Raises UserError
    where a shard cannot be read.
    """
    target = cache_dir / "streams" / f"{digest(urls)}.json"
    try:
        make_once(target, lambda path: _write_count(path, urls, read, name))
        return int(json.loads(target.read_text("utf8"))["samples"])
    except OSError as error:
        raise UserError(
            f"the number of samples of {name!r} cannot be kept in {target.parent} "
            f"({error.strerror}); give length: N for this dataset"
        ) from error


def digest(urls: Sequence[str]) -> str:
    """A short name of a list of shards."""
    return hashlib.blake2b("\n".join(urls).encode(), digest_size=8).hexdigest()


def _write_count(path: Path, urls: Sequence[str], read: Callable[[str], Any], name: str) -> None:
    with ThreadPoolExecutor(_THREADS) as pool:
        counts = list(pool.map(_stated, urls))
        unknown = [number for number, count in enumerate(counts) if count is None]
        if unknown:
            Progress().message(
                f"{name}: counting the samples of {len(unknown)} shards by reading them once "
                "(length: N for this dataset saves it)"
            )
        tasks = [urls[number] for number in unknown]
        for number, counted in zip(unknown, pool.map(lambda url: _counted(url, read), tasks),
                                   strict=True):  # fmt: skip
            counts[number] = counted
    path.write_text(json.dumps({"samples": sum(filter(None, counts)), "shards": len(urls)}), "utf8")


def _stated(url: str) -> int | None:
    """What the statistics file beside a shard says, where there is one."""
    beside = re.sub(r"\.tar$", "_stats.json", url)
    if beside == url or url.startswith("pipe:"):
        return None
    try:
        with open_shard(beside) as file:
            return int(json.loads(file.read(_MAX_STATISTICS))["successes"])
    except (BadSample, ValueError, KeyError, TypeError):
        return None


def _counted(url: str, read: Callable[[str], Any]) -> int:
    count = 0
    last: Item | None = None
    for last in read(url):
        count += last.number != WHOLE_SHARD
    if last is None:
        raise UserError(f"the shard {url} holds no sample")
    if last.bad is not None and not count:
        raise UserError(f"a shard cannot be counted: {last.bad}; mend it, or give length: N")
    return count


def copy_shards(urls: Sequence[str], *, name: str, cache_dir: Path) -> list[str]:
    """Local copies under ``cache_dir``, made once, of those shards that are not local already.

    Raises UserError for a shard that cannot be read, and where nothing can be written.
    """
    folder = cache_dir / "streams" / digest(urls)
    names = (re.sub(r"[^\w.-]+", "_", url.removesuffix(".tar"))[-80:] for url in urls)
    targets = [
        folder / f"{number:05d}_{base}.tar" if is_remote(url) else Path(url)
        for number, (url, base) in enumerate(zip(urls, names, strict=True))
    ]
    missing = [
        (url, target)
        for url, target in zip(urls, targets, strict=True)
        if is_remote(url) and not target.exists()
    ]
    if missing:
        Progress().message(f"{name}: copying {len(missing)} shards to {folder}")
    try:
        with ThreadPoolExecutor(_THREADS) as pool:
            list(pool.map(lambda pair: _copy(*pair), missing))
    except BadSample as bad:
        raise UserError(f"dataset {name!r}: a shard cannot be copied: {bad}") from bad
    except OSError as error:
        raise UserError(f"dataset {name!r}: no copies can be kept in {folder}: {error}") from error
    return list(map(str, targets))


def _copy(url: str, target: Path) -> None:
    def make(path: Path) -> None:
        with open_shard(url) as shard, path.open("wb") as file:
            while data := shard.read(_CHUNK):
                file.write(data)

    make_once(target, make)
