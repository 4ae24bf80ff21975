"""Encoders, trained or frozen, and models of images that are normalised on the device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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

    def check_width(self, declared: int | None, what: str, key: str) -> None:
        """Raises UserError for features of another width than ``embedding_dim`` declares."""
        if declared not in (None, self.width):
            raise UserError(
                f"{what} puts out vectors of {self.width} numbers, not {declared}; set "
                f"{key}.embedding_dim: {self.width} or leave it out",
                key=f"{key}.embedding_dim",
            )


class ImageTower(Tower):
    """An image encoder: one vector an image, or its tokens, of which prefix (class) tokens come
    first."""

    token_width: int
    num_prefix_tokens: int

    def tokens(self, image_BCHW: Tensor, layer: int = -1) -> Tensor:
        """All positions [B, N, D] of normalised images.

        ``layer`` counts hidden layers from the end: -1 is the last (of timm after its norm, else
        what transformers calls the last hidden state), -2 what the layer before it puts out.
        """
        raise NotImplementedError

    @staticmethod
    def check_size(image_BCHW: Tensor, size: Sequence[int]) -> None:
        """Raises UserError for images of another size than positions were made for."""
        height, width = image_BCHW.shape[2:]
        if (height, width) != tuple(size):
            raise UserError(
                f"the transforms put out images of {height} × {width} pixels, but the image "
                f"encoder takes {size[0]} × {size[1]}; let train and valid transforms put out one "
                "size, and leave image_size out or set it to that",
                key="model.image_encoder.image_size",
            )


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
        """Images less the mean, over the standard deviation; floating point is taken as normalised
        already."""
        if image_BCHW.is_floating_point():
            return image_BCHW
        # The loader's memory is BHWC; which convolution is chosen would depend on that.
        image_BCHW = image_BCHW.to(self.mean_C11.dtype, memory_format=torch.contiguous_format)
        return image_BCHW.sub_(self.mean_C11).div_(self.std_C11)


@contextmanager
def modes_restored(model: nn.Module) -> Iterator[None]:
    """Train or evaluation mode of every module is afterwards as it was before the block."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
