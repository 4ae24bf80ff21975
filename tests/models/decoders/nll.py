"""The training loss of a decoder, row by row, as a model with it computes it."""

from typing import Any

from torch import Tensor

from engine.losses.language_model import row_losses
from engine.models.decoders.language_model import DecoderInput


def nll(
    decoder: Any, image_MND: Tensor, ids_BT: Tensor, mask_BT: Tensor, labels: Tensor,
    num_images_B: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Σ −log p of each row's supervised labels, [B]."""
    hidden = decoder.label_states(DecoderInput(image_MND, ids_BT, mask_BT, num_images_B), labels)
    return row_losses(hidden, labels, *decoder.head())
