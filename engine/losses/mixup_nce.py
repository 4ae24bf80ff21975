"""MixUpNCE: NCE of features mixed with a partner's, λ·CE(own) + (1 − λ)·CE(partner's).

The targets of both directions are mixed so, and the logged loss is this one. ZeroVL's coin flipping
(arXiv 2112.09331): a step mixes either its images or its text features.
"""

from engine.config import schema
from engine.losses.softmax import SoftmaxLoss

NAMES = ("MixUpNCE",)


def build(config: schema.Loss) -> SoftmaxLoss:
    """Options: loss.mixup beside those of NCE."""
    return SoftmaxLoss(config, config.mixup)
