"""A linear probe of an image tower: nothing but a classifier on its frozen features is fitted.

The fitting is an evaluation (``engine/evals/linear_probe.py``), so that a contrastive run can do
the same on its way; this task is the tower alone, as it comes from timm or from a run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from engine.config.schema import Config, Normalize
from engine.data.batch_memory import stack_images
from engine.data.text.tokenizer import TextTokenizer
from engine.data.transforms.geometry import square
from engine.data.transforms.pipeline import output_size
from engine.errors import UserError
from engine.models.towers import ImageModel
from engine.types import Batch, Sample, Task


class FrozenTower(ImageModel):
    """An image encoder that takes uint8 images and normalises them on the device."""

    def __init__(self, image_encoder: nn.Module, normalize: Normalize) -> None:
        super().__init__(normalize.mean, normalize.std)
        self.image_encoder = image_encoder.requires_grad_(False)

    def forward(self, batch: Batch) -> Tensor:
        """Features [B, D] of ``image_BCHW``."""
        return self.image_encoder(self.normalise(batch["image_BCHW"]))


class LinearProbeTask(Task):
    """Features of images only; there is no loss to train."""

    trains = False

    def __init__(self, config: Config, tokenizer: TextTokenizer | None = None) -> None:
        super().__init__(config)
        if not config.eval.linear_probe.train:
            raise UserError(
                "name the labelled images to probe on, e.g. eval.linear_probe.train=cifar10",
                key="eval.linear_probe.train",
            )

    def build_model(self) -> FrozenTower:
        """The image tower that ``model.image_encoder`` describes."""
        transforms = self.config.transforms
        size = square(output_size(transforms.valid_transforms, transforms))
        size = self.config.model.image_encoder.image_size or size
        tower = self.part("models/image", "model.image_encoder", image_size=size)
        return FrozenTower(tower, transforms.normalize)

    def batch(self, samples: list[Sample]) -> Batch:
        """Collate: uint8 ``image_BCHW``."""
        return {"image_BCHW": stack_images(samples)}

    def encode(self, model: Callable[..., Any], batch: Batch, modality: str) -> Tensor:
        """Features [B, D]."""
        return model(batch)


build = LinearProbeTask
