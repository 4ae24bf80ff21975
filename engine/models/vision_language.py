"""An image encoder, a connector and a decoder: a language model that has seen the image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from engine.losses.language_model import row_losses
from engine.models.decoders.language_model import Decoder
from engine.models.decoders.prefix import PrefixDecoder
from engine.models.towers import ImageModel
from engine.types import Batch


class VisionLanguage(ImageModel):
    """Images to tokens to text.

    Args:
        image_encoder: module whose ``tokens(image_BCHW, layer)`` gives [B, N, D], prefix (class)
            tokens first, ``num_prefix_tokens`` of them.
        connector: [B, N, D] → [B, N, decoder.width].
        decoder: see ``Decoder``.
        layer: hidden layer of the image encoder, from the end; -1 is the last, after its norm.
        keep_prefix: whether the encoder's prefix tokens are given to the decoder.
        label_smoothing: of the loss.
        mean, std: of the image channels, for values in 0…1.
    """

    def __init__(
        self,
        image_encoder: nn.Module,
        connector: nn.Module,
        decoder: Decoder,
        *,
        layer: int,
        keep_prefix: bool,
        label_smoothing: float,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        super().__init__(mean, std)
        self.image_encoder, self.connector, self.decoder = image_encoder, connector, decoder
        self.layer, self.keep_prefix = layer, keep_prefix
        self.label_smoothing = label_smoothing

    def image_tokens(self, image_BCHW: Tensor) -> Tensor:
        """Images (uint8, or normalised floats) as the decoder takes them, [B, N, decoder.width]."""
        encoder: Any = self.image_encoder
        tokens_BND = encoder.tokens(self.normalise(image_BCHW), self.layer)
        if not self.keep_prefix:
            tokens_BND = tokens_BND[:, encoder.num_prefix_tokens :]
        return self.connector(tokens_BND)

    def batch_tokens(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """``image_MND`` of all rows' images in turn, and ``num_images_B`` (None: one each).

        A batch of texts alone runs one black image through all the same, and drops it: parameters
        get a gradient of zeros, and no other rank waits for this one.
        """
        if "image_BCHW" in batch:
            return self.image_tokens(batch["image_BCHW"]), None
        image_BKCHW, num_images_B = batch["image_BKCHW"], batch["num_images_B"]
        place_K = torch.arange(image_BKCHW.shape[1], device=num_images_B.device)
        image_MCHW = image_BKCHW[place_K < num_images_B[:, None]]
        if len(image_MCHW):
            return self.image_tokens(image_MCHW), num_images_B
        with _batch_norms_at_rest(self):
            blank_1ND = self.image_tokens(image_BKCHW.new_zeros(1, *image_BKCHW.shape[2:]))
        return blank_1ND[:0], num_images_B

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """``nll_B``: Σ −log p of each row's supervised tokens, and ``tokens_B``, their number."""
        image_MND, num_images_B = self.batch_tokens(batch)
        labels = batch["labels_BL"] if "labels_BL" in batch else batch["labels_BT"]
        texts = batch["input_ids_BT"], batch["attention_mask_BT"]
        hidden = self.decoder.label_states(image_MND, *texts, labels, num_images_B)
        head, smoothing = self.decoder.head(), self.label_smoothing
        nll_B = row_losses(hidden, labels, *head, label_smoothing=smoothing)
        return {"nll_B": nll_B, "tokens_B": (labels >= 0).sum(1)}


class Recognizer(VisionLanguage):
    """Images to labels: see ``PrefixDecoder.label_losses`` for a batch's texts."""

    decoder: PrefixDecoder

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """``nll_B``: Σ −log p of each row's learned tokens, and ``tokens_B``, their number."""
        image_BND = self.image_tokens(batch["image_BCHW"])
        nll_B = self.decoder.label_losses(image_BND, batch, self.label_smoothing)
        return {"nll_B": nll_B, "tokens_B": (batch["source_BT"] >= 0).sum(1)}


@contextmanager
def _batch_norms_at_rest(model: nn.Module) -> Iterator[None]:
    """Batch norms use their running statistics and leave them: what is run here is not data."""
    training = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.training]
    for norm in training:
        norm.training = False
    try:
        yield
    finally:
        for norm in training:
            norm.training = True
