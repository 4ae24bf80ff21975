"""The plain step: features, losses, backward, over all of this rank's rows at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from engine.config.schema import Data, Runner
from engine.dist import collectives
from engine.dist.parallel import Parallel
from engine.train import rng
from engine.train.precision import Precision
from engine.train.steps.batches import reported, to_device
from engine.types import Batch, Task

NAMES = ("clip_bs",)


def build(
    runner: Runner,
    data: Data,
    *,
    task: Task,
    model: Parallel,
    precision: Precision,
    device: torch.device,
) -> Callable[[Batch, int], dict[str, Tensor]]:
    """A function of a batch and its step that leaves the gradients, averaged over ranks.

    They are in ``.grad``, times the fp16 scaler's scale; it returns the losses.
    """

    def gradients(batch: Batch, step: int) -> dict[str, Tensor]:
        seed = rng.derive(runner.seed, step, collectives.rank(), 0)
        with rng.isolated(seed, device), precision.autocast():
            features = task.features(model.wrapped, to_device(batch, device))
        losses = task.losses(features)  # outside autocast: a loss picks its own number formats
        model.backward([model.scale(losses["loss"])])
        return reported(losses, features)

    return gradients
