"""Which ranks share negatives, and how each comes by the others' text features.

One-sided: only texts travel, images stay. Rank n holds the rows I_n of the similarity matrix
S = I Tᵀ, so it knows its rows' sums; the columns' partial sums are all-reduced (one float a
column); dI_n is local, and only dT goes back. That is half the traffic of gathering both sides.
``all`` gathers every text at once and reduce-scatters dT; ``ring`` passes one rank's texts (and
their gradient with them) around, so that no rank holds the texts of more than two others.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate, pairwise
from typing import Literal

import torch
from torch import Tensor

from engine.dist import collectives
from engine.errors import UserError

Work = Callable[[slice, Tensor], None]  # columns of S, their texts
GradientWork = Callable[[slice, Tensor, Tensor], None]  # and where their gradient adds up


class Exchange:
    """The texts of one step's batch. Every rank constructs it at the same point.

    ``weight`` turns a sum over this rank's rows into L_r = world × this rank's share of the global
    mean, so that the mean of L_r over ranks, and of its gradient, is the global batch's.
    ``group_size`` ranks share negatives (-1: all), as the loss's ``options`` say.
    """

    def __init__(
        self,
        num_rows: int,
        form: Literal["all", "ring"] = "all",
        group_size: int = -1,
        options: str = "nce_loss",
    ) -> None:
        world = collectives.world()
        if group_size not in (0, -1) and world % min(group_size, world):
            key = f"loss.{options}.group_size"
            raise UserError(
                f"{key} {group_size} does not divide the {world} ranks; "
                "use a divisor, or -1 for all of them",
                key=key,
            )
        self.group = collectives.subgroup(group_size)
        self.rank, self.size = collectives.rank(self.group), collectives.world(self.group)
        everyone = collectives.row_counts(num_rows)
        before = collectives.rank() - self.rank
        self.counts = everyone[before : before + self.size]
        self.num_columns = sum(self.counts)
        starts = [0, *accumulate(self.counts)]
        self._columns = [slice(a, b) for a, b in pairwise(starts)]
        self.own = self._columns[self.rank]
        self.weight = world / max(1, sum(everyone))
        self._ring = form == "ring" and self.size > 1

    def collect(self, text_BD: Tensor) -> Tensor:
        """What a visit starts from: all the group's texts, or with a ring this rank's own."""
        if self._ring:
            return text_BD
        return collectives.all_gather_rows(text_BD, self.counts, self.group)

    def visit(self, text: Tensor, work: Work) -> None:
        """Call ``work(columns, text_KD)`` until all of the group's texts have been seen."""
        if not self._ring:
            return work(slice(0, self.num_columns), text)
        for hop in range(self.size):
            owner = (self.rank - hop) % self.size
            arriving = self._pass_on(text, owner) if hop < self.size - 1 else None
            work(self._columns[owner], text)
            text = arriving() if arriving else text
        return None

    def visit_with_gradient(self, text: Tensor, dtype: torch.dtype, work: GradientWork) -> Tensor:
        """The same with a place for the texts' gradients; returns the sum for this rank's own."""
        dtext = torch.zeros_like(text, dtype=dtype)
        if not self._ring:
            work(slice(0, self.num_columns), text, dtext)
            return collectives.reduce_scatter_rows(dtext, self.counts, self.group)
        for hop in range(self.size):
            owner = (self.rank - hop) % self.size
            arriving = self._pass_on(text, owner) if hop < self.size - 1 else None
            work(self._columns[owner], text, dtext)
            dtext = self._pass_on(dtext, owner)()  # after the last hop it is home
            text = arriving() if arriving else text
        return dtext

    def _pass_on(self, block: Tensor, owner: int) -> Callable[[], Tensor]:
        """Send a block to the next rank while the one before ``owner``'s arrives."""
        rows = self.counts[(owner - 1) % self.size]
        return collectives.start_shift(block, rows, self.group)
