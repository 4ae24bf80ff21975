"""Several datasets counted as one, end to end, as torch's ConcatDataset has it.

    both: {format: concat, parts: [one, other]}

Each part is a dataset name, with its own format and options. To ``data.train_type: debias`` they
are one dataset, from whose parts a batch is mixed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pydantic import Field

from engine.config.schema import Section
from engine.data.stream.source import Stream
from engine.data.views import Concatenated
from engine.errors import UserError
from engine.types import Source

OpenPart = Callable[[str], Source | Stream]


class Config(Section):
    """Options of ``format: concat``."""

    parts: list[str] = Field(min_length=1)  # names of datasets


def build(
    config: Config, *, name: str, split: str, cache_dir: Path, open_part: OpenPart
) -> Concatenated:
    """One split of all parts. Raises UserError for a part that cannot be opened, that is listed
    twice or is streamed, and for parts whose classes differ."""

    def error(what: str) -> UserError:
        return UserError(f"dataset {name!r} {what}", key=f"data.datasets.{name}.parts")

    twice = next((part for part in config.parts if config.parts.count(part) > 1), None)
    if twice is not None:
        raise error(
            f"lists its part {twice!r} twice; keep one (repeat: 2 in data.datasets.{twice} shows "
            "its rows twice an epoch)"
        )
    opened = [open_part(part) for part in config.parts]
    parts = [part for part in opened if not isinstance(part, Stream)]
    if len(parts) < len(opened):
        raise error(
            "has streamed parts, which have no rows to count; list them in data.train_name "
            "instead, or copy their shards to this machine"
        )
    first = parts[0]
    if other := next((part for part in parts if part.classes != first.classes), None):
        raise error(
            f"has parts of different classes, {first.name!r} and {other.name!r}, so that one label "
            "would mean two things; give them the same class folders"
        )
    return Concatenated(name, parts)
