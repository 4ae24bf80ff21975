"""NCE: softmax contrast of images and texts, both directions averaged (CLIP's loss)."""

from engine.config import schema
from engine.losses.softmax import SoftmaxLoss

NAMES = ("NCE",)


def build(config: schema.Loss) -> SoftmaxLoss:
    """Options: loss.nce_loss and loss.temperature."""
    return SoftmaxLoss(config)
