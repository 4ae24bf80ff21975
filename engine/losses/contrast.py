"""What the contrastive losses share: pairs and their mixing, and the exchange of texts over ranks.

One-sided: only texts travel, images stay. Rank n holds the rows I_n of the similarity matrix
S = I Tᵀ, so it knows its rows' sums; the columns' partial sums are all-reduced (one float a
column); dI_n is local, and only dT goes back. That is half the traffic of gathering both sides.
``all`` gathers every text at once and reduce-scatters dT; ``ring`` passes one rank's texts (and
their gradient with them) around, so that no rank holds the texts of more than two others.
"""

from __future__ import annotations

import math
import random
from abc import ABC, abstractmethod
from collections.abc import Callable
from itertools import accumulate, pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from engine.config import schema
from engine.dist import collectives
from engine.errors import UserError
from engine.losses.tiles import Positive, compute_dtype, slices
from engine.types import Features, Mix

Work = Callable[[slice, Tensor, Any], None]
"""Columns of S, their texts, and where the texts' gradient adds up (None: no gradient)."""


class Contrast(ABC):
    """A contrastive loss with a learned or constant log-scale.

    ``parameters``: the starting value of each scalar, and whether it is learned; ``bounds``: the
    range (low, high) where a learned one is held.
    """

    def __init__(self, config: schema.Loss, log_scale: float) -> None:
        learned = config.temperature.name == "parameter"
        self.config = config
        self.parameters = {"logit_scale": (log_scale, learned)}
        self.bounds = {"logit_scale": (None, -math.log(config.temperature.min))} if learned else {}

    def mix(self, step: int, seed: int) -> Mix | None:
        """What this step mixes, a pure function of step and seed; None under a plain name."""
        mixed = self.config.name.lower().startswith("mixup")
        return draw_mix(step, seed, self.config.mixup) if mixed else None

    def __call__(self, features: Features) -> dict[str, Tensor]:
        """{"loss": L_r}; the mean of L_r over ranks, and of its gradient, is the global batch's."""
        image_BD = features.per_sample["image_BD"]
        with torch.autocast(image_BD.device.type, enabled=False):
            scale = features.shared["logit_scale"].to(compute_dtype(image_BD)).exp().squeeze()
            partner_B = features.per_sample.get("partner_offset_B")
            lam = features.info.get("lam", 1.0)
            matches = positives(len(image_BD), image_BD.device, partner_B, lam)
            return {"loss": self.contrast(features, scale, matches)}

    @abstractmethod
    def contrast(self, features: Features, scale: Tensor, matches: list[Positive]) -> Tensor:
        """L_r at the scale [ ], without autocast."""


def draw_mix(step: int, seed: int, config: schema.Mixup) -> Mix:
    """One step's λ ~ Beta(β, β) and fair coin: heads mixes the images, tails the text features.

    Drawn from the step's number alone, so that every rank and sub-batch agree. Coin flipping is of
    ZeroVL (arXiv 2112.09331, section 3.3); modality ``both`` mixes both always, with the same λ and
    partners.
    """
    rng = random.Random(f"mixup/{seed}/{step}")  # a text seeds by SHA-512, the same everywhere
    lam = rng.betavariate(config.beta, config.beta)
    heads = rng.random() < 0.5
    both = config.modality == "both"
    return Mix(
        lam=lam,
        image=both or heads,
        text=both or not heads,
        partner=config.partner,
        seed=rng.getrandbits(62),
    )


def positives(
    num_rows: int, device: torch.device, partner_offset_B: Tensor | None, lam: float
) -> list[Positive]:
    """Row i matches text i, and under mixup (weight 1 − λ) also its partner p(i), of this rank too.

    Image to text, row i's partner is column p(i); text to image, column j's partner is row p(j),
    which makes it row i's column p⁻¹(i). They differ only where p is not its own inverse.
    """
    own_B = torch.arange(num_rows, device=device)
    if partner_offset_B is None:
        return [Positive(own_B, 1.0, 1.0)]
    partner_B = own_B + partner_offset_B
    inverse_B = torch.empty_like(own_B).scatter_(0, partner_B, own_B)
    return [
        Positive(own_B, lam, lam),
        Positive(partner_B, 1 - lam, 0.0),
        Positive(inverse_B, 0.0, 1 - lam),
    ]


def agreement(image_BD: Tensor, text_BD: Tensor, matches: list[Positive]) -> Tensor:
    """Σ over rows and matches of the directions' mean weight · I_i·T_match, as a scalar."""
    total = image_BD.new_zeros((), dtype=compute_dtype(image_BD))
    for match in matches:
        total += match.weight() * inner(image_BD, text_BD, match.text)
    return total


def inner(a_BD: Tensor, b_BD: Tensor, row_B: Tensor | None = None) -> Tensor:
    """Σ_i a_i·b_i, or Σ_i a_i·b_row(i), as a scalar, without a third tensor of their size."""
    total = a_BD.new_zeros((), dtype=compute_dtype(a_BD))
    for part in slices(len(a_BD), 1024):
        b_hD = b_BD[part] if row_B is None else b_BD[row_B[part]]
        total += torch.linalg.vecdot(a_BD[part].to(total.dtype), b_hD.to(total.dtype)).sum()
    return total


class Exchange:
    """The texts of one step's batch; every rank constructs it at the same point.

    ``weight`` turns a sum over this rank's rows into L_r = world × this rank's share of the global
    mean, so that the mean of L_r over ranks, and of its gradient, is the global batch's.
    ``group_size`` ranks share negatives (-1: all), as ``loss.SECTION.group_size`` says.
    """

    def __init__(
        self,
        num_rows: int,
        form: Literal["all", "ring"] = "all",
        group_size: int = -1,
        section: str = "nce_loss",
    ) -> None:
        world = collectives.world()
        if group_size not in (0, -1) and world % min(group_size, world):
            key = f"loss.{section}.group_size"
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

    def visit(self, text: Tensor, work: Work, gradient: torch.dtype | None = None) -> Tensor:
        """Call ``work(columns, text_KD, dtext_KD)`` until it has seen all of the group's texts.

        With a ``gradient`` dtype ``work`` adds the texts' gradient to dtext_KD, and the sum over
        ranks for this rank's own texts is returned; else there is none, and ``text`` is.
        """
        dtext = None if gradient is None else torch.zeros_like(text, dtype=gradient)
        if not self._ring:
            work(slice(0, self.num_columns), text, dtext)
            if dtext is None:
                return text
            return collectives.reduce_scatter_rows(dtext, self.counts, self.group)
        for hop in range(self.size):
            owner = (self.rank - hop) % self.size
            arriving = self._pass_on(text, owner) if hop < self.size - 1 else None
            work(self._columns[owner], text, dtext)
            if dtext is not None:
                dtext = self._pass_on(dtext, owner)()  # after the last hop it is home
            text = arriving() if arriving else text
        return text if dtext is None else dtext

    def _pass_on(self, block: Tensor, owner: int) -> Callable[[], Tensor]:
        """Send a block to the next rank while the one before ``owner``'s arrives."""
        rows = self.counts[(owner - 1) % self.size]
        return collectives.start_shift(block, rows, self.group)
