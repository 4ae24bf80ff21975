"""The state of a run that trains, as ``train`` builds it and ``check`` looks at it."""

from __future__ import annotations

import torch
from torch import nn

from engine import registry
from engine.config.schema import Transforms
from engine.data.transforms import pipeline
from engine.evals.predict import evaluating
from engine.run import Run
from engine.train import state
from engine.train.state import TrainState


def check_dist(run: Run) -> None:
    """Raises UserError for whatever in ``dist`` cannot work, before any data is read."""
    part = registry.find("dist", run.config.dist.name, key="dist.name")
    part.check(run.config, run.device, run.precision.name)


def build_state(run: Run, total_steps: int, *, sharded: bool = True) -> TrainState:
    """The model, wrapped for the world it runs in, and its optimizer.

    Without ``sharded`` the model stays whole, to be looked at, even where a run would shard it.
    """
    config = run.config
    part = registry.find("dist", config.dist.name, key="dist.name")
    module = run.build_model(torch.device("cpu") if part.SHARDS else run.device)
    if config.eval.epoch_interval is not None and config.data.valid_name:
        _check_size(module, config.transforms)
    return state.build_state(
        config, module, part if sharded else None, run.device, run.precision, total_steps,
        run.checkpoint if sharded else None,
    )  # fmt: skip


def _check_size(model: nn.Module, transforms: Transforms) -> None:
    """Raises UserError where images of evaluations have a size that the image encoder cannot take.

    It takes that of training: nothing is run where both are the same.
    """
    train, valid = (
        pipeline.output_size(names, transforms)
        for names in (transforms.train_transforms, transforms.valid_transforms)
    )
    tower = dict(model.named_children()).get("image_encoder")
    if tower is not None and train != valid:
        weight = next(tower.parameters())
        with torch.no_grad(), evaluating(tower):
            tower(torch.zeros(1, 3, *valid, device=weight.device, dtype=weight.dtype))
