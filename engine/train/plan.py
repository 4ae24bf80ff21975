"""What a run will read, in which order, and for how many steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from engine import registry
from engine.config.schema import Config
from engine.data.sources import open_source
from engine.errors import UserError
from engine.types import Source


@dataclass(frozen=True)
class Plan:
    """Training sources, the sampler over them, and the number of steps. Equal on every rank."""

    sources: list[Source]
    sampler: Any
    steps_per_epoch: int
    epochs: int

    @property
    def total_steps(self) -> int:
        return self.steps_per_epoch * self.epochs

    def place(self, step: int) -> tuple[int, int]:
        """Epoch and step in it of the run's ``step``, both from 0."""
        return divmod(step, self.steps_per_epoch)

    def rows(self, step: int) -> np.ndarray:
        """The global batch of a step: int64 [n, 2] of (dataset, row)."""
        return self.sampler.batch(*self.place(step))


def make_plan(config: Config, world: int) -> Plan:
    """Open the training data and lay out the steps. Raises UserError for what cannot be done."""
    data = config.data
    if not data.train_name:
        raise UserError(
            "data.train_name is empty: name at least one dataset", key="data.train_name"
        )
    if data.batch_size % world:
        raise UserError(
            f"data.batch_size {data.batch_size} cannot be shared by {world} processes: "
            f"take a multiple of {world}",
            key="data.batch_size",
        )
    sources = [open_source(name, "train", data, key="data.train_name") for name in data.train_name]
    sampler = registry.find("data/samplers", data.train_type, key="data.train_type").build(
        [len(source) for source in sources],
        data.batch_size,
        config.runner.seed,
        data.debias,
        names=data.train_name,
    )
    steps = sampler.steps(0)
    if data.train_steps:
        steps = min(steps, data.train_steps)
    return Plan(sources, sampler, steps, config.epoch.total)


def order_key(config: Config, plan: Plan) -> dict[str, Any]:
    """Everything that the order of samples hangs on: a resumed run must agree in all of it."""
    return {
        "runner.seed": config.runner.seed,
        "data.train_name": list(config.data.train_name),
        "data.train_type": config.data.train_type,
        "data.batch_size": config.data.batch_size,
        "data.train_steps": config.data.train_steps,
        "rows of each dataset": [len(source) for source in plan.sources],
        "data.debias": config.data.debias.model_dump(mode="json"),
    }
