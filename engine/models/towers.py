"""Around image encoders: normalised images, images of a wrong size, layers without a use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from engine.errors import UserError


class Tower(nn.Module):
    """An encoder, trained or frozen: a frozen one stays in evaluation mode, so that there is no
    dropout and batch statistics do not move.

    Args:
        width: of its pooled features.
    """

    def __init__(self, model: Any, width: int, trainable: bool) -> None:
        super().__init__()
        self.model, self.width, self.trainable = model, int(width), trainable
        self.requires_grad_(trainable)
        self.train(trainable)

    def train(self, mode: bool = True) -> Self:
        """Frozen, it ignores ``mode``."""
        return super().train(mode and self.trainable)


class ImageModel(nn.Module):
    """A model of images that come as uint8.

    Args:
        mean, std: of the image channels, for values in 0…1.
    """

    mean_C11: Tensor
    std_C11: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        # in units of uint8, and not saved: they are the configuration's
        self.register_buffer("mean_C11", 255 * torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std_C11", 255 * torch.tensor(std).view(-1, 1, 1), persistent=False)

    def normalise(self, image_BCHW: Tensor) -> Tensor:
        """Images as an encoder takes them: less the mean, over the standard deviation.

        Floating point is taken as normalised already.
        """
        if image_BCHW.is_floating_point():
            return image_BCHW
        # The loader's memory is BHWC; which convolution is chosen would depend on that.
        image_BCHW = image_BCHW.to(self.mean_C11.dtype, memory_format=torch.contiguous_format)
        return image_BCHW.sub_(self.mean_C11).div_(self.std_C11)


def wrong_size(image_BCHW: Tensor, size: Sequence[int]) -> UserError:
    """The error of images that are not as large as an image encoder with fixed positions wants."""
    height, width = image_BCHW.shape[2:]
    return UserError(
        f"the transforms put out images of {height} × {width} pixels, but the image encoder takes "
        f"{size[0]} × {size[1]}; let train and valid transforms put out one size, and leave "
        "image_size out or set it to that",
        key="model.image_encoder.image_size",
    )


def freeze_unused(encoder: nn.Module, layer: int, size: tuple[int, int]) -> None:
    """Freeze what ``encoder.tokens(image, layer)`` does not use: layers behind it.

    Left trainable they would get no gradient, for which all ranks would wait. Tries one image of
    ``size``. Raises UserError where the encoder has no such layer, or takes no such image.
    """
    tower: Any = encoder
    trained = {name: p for name, p in encoder.named_parameters() if p.requires_grad}
    modes = [(module, module.training) for module in encoder.modules()]
    encoder.eval()  # running statistics stay as they are
    try:
        with torch.set_grad_enabled(bool(trained)):
            tokens_BND = tower.tokens(torch.zeros(1, 3, *size), layer)
        if trained:
            found = torch.autograd.grad(tokens_BND.sum(), list(trained.values()), allow_unused=True)
            for parameter, gradient in zip(trained.values(), found, strict=True):
                parameter.requires_grad_(gradient is not None)
    except (IndexError, AssertionError, ValueError, AttributeError) as error:
        raise UserError(
            f"the image encoder gives no hidden layer {layer}: "
            f"{(str(error).splitlines() or [type(error).__name__])[0]}",
            key="model.connector.layer",
        ) from error
    finally:
        for module, training in modes:
            module.training = training
