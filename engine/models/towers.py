"""Encoders, trained or frozen, and models of images that are normalised on the device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn

from engine.errors import UserError


class Tower(nn.Module):
    """An encoder of features ``width`` wide. A frozen one stays in evaluation mode: there is no
    dropout, and batch statistics do not move."""

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
    size: tuple[int, ...] | None = None  # of the images that its positions were made for

    def tokens(self, image_BCHW: Tensor, layer: int = -1) -> Tensor:
        """All positions [B, N, D] of normalised images.

        ``layer`` counts hidden layers from the end: -1 is the last (of timm after its norm, else
        what transformers calls the last hidden state), -2 what the layer before it puts out.
        """
        raise NotImplementedError

    def check_size(self, image_BCHW: Tensor) -> None:
        """Raises UserError for images of another size than positions were made for."""
        if self.size and image_BCHW.shape[2:] != self.size:
            given, taken = (" × ".join(map(str, s)) for s in (image_BCHW.shape[2:], self.size))
            raise UserError(
                f"the transforms put out images of {given} pixels, but the image encoder takes "
                f"{taken}; let train and valid transforms put out one size, and leave image_size "
                "out or set it to that",
                key="model.image_encoder.image_size",
            )


class ImageModel(nn.Module):
    """A model of images that come as uint8; ``mean`` and ``std`` are for values in 0…1."""

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
