"""What is known to be lost in tar shards before anything of them is read, in one sentence."""

from __future__ import annotations

import numpy as np
import pyarrow.compute as pc

from engine.data.tar.shards import ShardSource
from engine.types import Source

_NUM_NAMED = 3


def known_damage(source: Source) -> list[str]:
    """A sentence for each damaged set of shards below ``source``; views are looked through."""
    if isinstance(source, ShardSource):
        return [told] if (told := _told(source)) else []
    return [text for one in source.below for text in known_damage(one)]


def _told(source: ShardSource) -> str | None:
    faults = source.faults
    damaged = np.flatnonzero(faults)
    if not len(damaged):
        return None
    named = []
    for shard in damaged[:_NUM_NAMED].tolist():
        opened = source.indexes[shard]
        first = int(pc.index(pc.not_equal(opened.rows.batch.column("cause"), ""), True).as_py())
        row = opened.rows[first]
        key = f"/{row.key}" if row.key else ""
        named.append(f"{opened.shown}{key}: {row.cause}, {row.detail}")
    more = ", …" if len(damaged) > _NUM_NAMED else ""
    return (
        f"{source.name}: {int(faults.sum())} of {len(source):,} samples are lost in "
        f"{len(damaged)} of {len(faults)} shards ({'; '.join(named)}{more})"
    )
