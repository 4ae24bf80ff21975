"""An image encoder, a connector and a decoder of labels."""

from __future__ import annotations

from torch import Tensor

from engine.models.decoders.truncated import TruncatedDecoder
from engine.models.vision_language import VisionLanguage
from engine.types import Batch


class Recognizer(VisionLanguage):
    """Images to labels: see ``TruncatedDecoder.label_losses`` for a batch's texts."""

    decoder: TruncatedDecoder

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """``nll_B``: Σ −log p of each row's learned tokens, and ``tokens_B``, their number."""
        image_BND = self.image_tokens(batch["image_BCHW"])
        nll_B = self.decoder.label_losses(image_BND, batch, self.label_smoothing)
        return {"nll_B": nll_B, "tokens_B": (batch["source_BT"] >= 0).sum(1)}
