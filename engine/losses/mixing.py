"""What a step mixes: drawn from its number alone, so that every rank and sub-batch agree."""

from __future__ import annotations

import random

from engine.config import schema
from engine.types import Mix


def draw(step: int, seed: int, config: schema.Mixup) -> Mix:
    """One step's λ ~ Beta(β, β) and fair coin: heads mixes the images, tails the text features.

    Coin flipping is of ZeroVL (arXiv 2112.09331, section 3.3); modality ``both`` mixes both
    always, with the same λ and partners.
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
