"""What a format of export is given: a trained model with all that it takes to use it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from engine.config.schema import Config


@dataclass(frozen=True, slots=True)
class Trained:
    """A run's model on the CPU, in fp32, in eval mode, its adapters merged; and where it is from.

    ``task`` is that of the run, by whose tokenizer and prompts the model was trained.
    """

    task_name: str
    config: Config
    task: Any
    model: nn.Module
    origin: str  # the checkpoint's path
    step: int | None
