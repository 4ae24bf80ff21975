"""An image encoder, a connector and a decoder: a language model that has seen the image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from engine.errors import UserError, first_line
from engine.losses.language_model import row_losses
from engine.models.decoders.language_model import Decoder, DecoderInput
from engine.models.decoders.prefix import PrefixDecoder
from engine.models.towers import ImageModel, ImageTower, modes_restored
from engine.types import Batch


class VisionLanguage(ImageModel):
    """Images to tokens to text.

    Args:
        connector: [B, N, image_encoder.token_width] → [B, N, decoder.width].
        layer: hidden layer of the image encoder, from the end; -1 is the last, after its norm.
        keep_prefix: whether the encoder's prefix tokens are given to the decoder.
        label_smoothing: of the loss.
        mean, std: of the image channels, for values in 0…1.
    """

    def __init__(
        self,
        image_encoder: ImageTower,
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
        tokens_BND = self.image_encoder.tokens(self.normalise(image_BCHW), self.layer)
        if not self.keep_prefix:
            tokens_BND = tokens_BND[:, self.image_encoder.num_prefix_tokens :]
        return self.connector(tokens_BND)

    def decoder_input(self, batch: Batch) -> DecoderInput:
        """A batch's texts, and the tokens of all rows' images in turn.

        A batch of texts alone runs one black image through all the same, and drops it: parameters
        get a gradient of zeros, and no other rank waits for this one.
        """
        texts = batch["input_ids_BT"], batch["attention_mask_BT"]
        if "image_BCHW" in batch:
            return DecoderInput(self.image_tokens(batch["image_BCHW"]), *texts)
        image_BKCHW, num_images_B = batch["image_BKCHW"], batch["num_images_B"]
        place_K = torch.arange(image_BKCHW.shape[1], device=num_images_B.device)
        image_MCHW = image_BKCHW[place_K < num_images_B[:, None]]
        if len(image_MCHW):
            return DecoderInput(self.image_tokens(image_MCHW), *texts, num_images_B)
        with modes_restored(self):
            for module in self.modules():
                if isinstance(module, _BatchNorm):  # whose statistics are of data alone
                    module.training = False
            blank_1ND = self.image_tokens(image_BKCHW.new_zeros(1, *image_BKCHW.shape[2:]))
        return DecoderInput(blank_1ND[:0], *texts, num_images_B)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """``nll_B``: Σ −log p of each row's supervised tokens, and ``tokens_B``, their number."""
        labels = batch["labels_BL"] if "labels_BL" in batch else batch["labels_BT"]
        hidden = self.decoder.label_states(self.decoder_input(batch), labels)
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


def freeze_unused(encoder: ImageTower, layer: int, size: tuple[int, int]) -> None:
    """Freeze what ``encoder.tokens(image, layer)`` does not use: layers behind it.

    Left trainable they would get no gradient, for which all ranks would wait. Tries one image of
    ``size``. Raises UserError where the encoder has no such layer, or takes no such image.
    """
    trained = [parameter for parameter in encoder.parameters() if parameter.requires_grad]
    with modes_restored(encoder):
        encoder.eval()  # running statistics stay as they are
        try:
            with torch.set_grad_enabled(bool(trained)):
                tokens_BND = encoder.tokens(torch.zeros(1, 3, *size), layer)
            if trained:
                found = torch.autograd.grad(tokens_BND.sum(), trained, allow_unused=True)
                for parameter, gradient in zip(trained, found, strict=True):
                    parameter.requires_grad_(gradient is not None)
        except (IndexError, AssertionError, ValueError, AttributeError) as error:
            raise UserError(
                f"the image encoder gives no hidden layer {layer}: {first_line(error)}",
                key="model.connector.layer",
            ) from error
