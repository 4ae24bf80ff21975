"""Which part of a sequence is a rank's."""

from __future__ import annotations

from typing import Any


def rank_slice(batch: Any, rank: int, world: int) -> Any:
    """A rank's contiguous share of a global batch; the first n % world ranks get one row more."""
    share, more = divmod(len(batch), world)
    first = rank * share + min(rank, more)
    return batch[first : first + share + (rank < more)]
