"""An image encoder, a connector and a decoder: a language model that has seen the image."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from engine.errors import UserError, first_line
from engine.losses.language_model import row_losses
from engine.models.decoders.language_model import Decoder, DecoderInput
from engine.models.decoders.prefix import PrefixDecoder
from engine.models.towers import ImageModel, ImageTower, modes_restored
from engine.registry import nearest
from engine.types import Batch

_KEY = "model.connector.name"
_MLP = re.compile(r"mlp(\d+)x_gelu")  # LLaVA's name for it


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


# --- connectors: from the image encoder's width to the decoder's


class Positions(nn.Module):
    """Adds its place in the image to each token: sines and cosines of its row and its column.

    For decoders without positions of their own for images (T5), beside tokens whose channels vary
    by about 1 (``linear_norm``); wavelengths of 2π to 20π tokens suit grids of up to 30 a side. The
    grid follows from ``aspect``, the image's height by its width, behind ``num_prefix_tokens``.
    """

    def __init__(self, aspect: float, num_prefix_tokens: int) -> None:
        super().__init__()
        self.aspect, self.num_prefix_tokens = aspect, num_prefix_tokens

    def forward(self, tokens_BND: Tensor) -> Tensor:
        """Tokens [B, N, D] → the same with positions. ValueError where they are not such a grid."""
        number, width = tokens_BND.shape[1] - self.num_prefix_tokens, tokens_BND.shape[2]
        rows = max(1, round(math.sqrt(number * self.aspect)))
        if number % rows:
            raise ValueError(f"{number} tokens are not a grid of {rows} rows")
        places = torch.arange(number, device=tokens_BND.device)
        steps = torch.arange(width // 4, device=tokens_BND.device)
        waves_W = 10.0 ** (-steps / (width // 4))
        parts = []
        for place_N in (places // (number // rows), places % (number // rows)):
            angle_NW = place_N[:, None] * waves_W
            parts += [angle_NW.sin(), angle_NW.cos()]
        place_ND = torch.cat(parts, 1).to(tokens_BND.dtype)
        space = 0, width - place_ND.shape[1], self.num_prefix_tokens, 0  # widths of 4n + 1, 2, 3
        return tokens_BND + nn.functional.pad(place_ND, space)


def build_connector(
    name: str, width: int, target: int, positions: Positions | None = None
) -> nn.Module:
    """Tokens [B, N, width] → [B, N, target], with ``positions`` added to what comes out.

    ``linear_norm`` is GIT's linear layer with a layer norm, ``mlpNx_gelu`` LLaVA's N linear layers
    with GELU between them. Raises UserError.
    """
    layers: list[nn.Module] = []
    if name == "identity":
        if width != target:
            raise UserError(f"identity cannot connect an image encoder {width} wide to a decoder "
                            f"that takes {target}; take linear", key=_KEY)  # fmt: skip
        layers = [nn.Identity()]
    elif name in ("linear", "linear_no_bias", "linear_norm"):
        layers = [nn.Linear(width, target, bias=name != "linear_no_bias")]
        if name == "linear_norm":
            layers.append(nn.LayerNorm(target))
    elif (found := _MLP.fullmatch(name)) and (depth := int(found[1])):
        for one, other in pairwise([width, *[target] * depth]):
            layers += [nn.Linear(one, other), nn.GELU()]
        layers.pop()
    else:
        known = ["identity", "linear", "linear_no_bias", "linear_norm", "mlp2x_gelu"]
        raise UserError(f"no connector is called {name!r}; {nearest(name, known)}", key=_KEY)
    if positions is not None:
        layers.append(positions)
    # parameters' names: one linear layer stands alone, all others in a sequence
    alone = len(layers) == 1 and not name.startswith("mlp")
    return layers[0] if alone else nn.Sequential(*layers)
