"""Names of shards as the field writes them: ``{00000..00012}.tar``, ``*.tar``, ``a.tar::b.tar``."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

from engine.errors import UserError

_BRACES = re.compile(r"\{([^{}]*(?:,|\.\.)[^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_REMOTE = re.compile(r"pipe:|(?!file:)[A-Za-z][A-Za-z0-9+.-]*://")
_MAX_SHARDS = 1_000_000
_NUM_NAMED = 5


def is_remote(url: str) -> bool:
    """Whether a shard is streamed (``pipe:``, ``http://``, ``s3://``, …), not read in place."""
    return _REMOTE.match(url) is not None


def expand(
    patterns: str | Sequence[str], root: Path | None = None, *, key: str | None = None
) -> list[str]:
    """Every shard that the patterns name, in their order; those of a glob are sorted.

    Patterns may be joined by ``::``. Braces hold a range, whose zeros on the left are kept, or a
    list. Local names are taken relative to ``root``, and need not exist unless they come from a
    glob; remote ones stay as they are. Raises UserError at ``key`` for patterns that name nothing.
    """
    given = [patterns] if isinstance(patterns, str) else list(patterns)
    parts = [part for pattern in given for part in pattern.split("::") if part]
    shards: list[str] = []
    for part in parts:
        for name in _braces(part):
            shards += [name] if is_remote(name) else _local(name, root or Path(), key)
            if len(shards) > _MAX_SHARDS:
                raise UserError(f"{part!r} names more than {_MAX_SHARDS:,} shards", key=key)
    if not shards:
        raise UserError(f"no shard is named by {patterns!r}", key=key)
    return shards


def _braces(pattern: str) -> Iterator[str]:
    """One by one, so that a digit too many does not fill the memory before it is noticed."""
    found = _BRACES.search(pattern)
    if found is None:
        yield pattern
        return
    before, after = pattern[: found.start()], pattern[found.end() :]
    for choice in _choices(found[1]):
        for rest in _braces(after):
            yield before + choice + rest


def _choices(inside: str) -> Iterable[str]:
    if (bounds := _RANGE.fullmatch(inside)) is None:
        return inside.split(",")
    first, last = bounds.groups()
    width = max(map(len, (first, last))) if "0" in (first[0], last[0]) else 0
    sign = 1 if int(first) <= int(last) else -1
    return (f"{n:0{width}d}" for n in range(int(first), int(last) + sign, sign))


def _local(name: str, root: Path, key: str | None) -> list[str]:
    path = root / unquote(urlsplit(name).path) if name.startswith("file:") else root / name
    if not glob.has_magic(name) or path.exists():
        return [str(path)]
    found = sorted(glob.glob(str(path), recursive=True))  # noqa: PTH207 (absolute patterns too)
    if not found:
        there = sorted(p.name for p in path.parent.glob("*.tar"))[:_NUM_NAMED]
        near = ", ".join(there) or "none"
        raise UserError(f"no file matches {path}; tars in {path.parent}: {near}", key=key)
    return found
