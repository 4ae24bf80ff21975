"""All evaluations that a configuration asks for, as one table of figures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from engine.config.schema import Config
from engine.data.bad_samples import summary
from engine.data.sources import open_source
from engine.data.transforms import pipeline
from engine.evals import retrieval
from engine.evals.encode import Encoder
from engine.types import Metrics


def evaluate(
    config: Config,
    task: Any,
    model: nn.Module,
    *,
    device: torch.device,
    autocast: Callable[[], Any],
    warn: Callable[[str], None],
) -> Metrics:
    """``DATASET/metric`` → value, in percent; every rank takes part and gets the same."""
    data, transforms = config.data, config.transforms
    encoder = Encoder(
        task,
        model,
        pipeline.build(transforms.valid_transforms, transforms, key="transforms.valid_transforms"),
        device,
        batch_size=data.batch_size_val,
        num_workers=data.num_workers,
        max_pixels=data.max_image_pixels,
        autocast=autocast,
    )
    found: dict[str, float] = {}
    for name in data.valid_name:
        source = open_source(name, "valid", data, key="data.valid_name")
        result = retrieval.evaluate(
            encoder,
            source,
            num_rows=data.valid_steps * data.batch_size_val if data.valid_steps else None,
            shuffle_words=config.eval.shuffle_words,
            seed=config.runner.seed,
        )
        if result.bad:
            warn(f"{name}: {len(result.bad)} rows left out: {summary(result.bad)}")
        found |= {f"{name}/{metric}": value for metric, value in result.metrics.items()}
    return found
