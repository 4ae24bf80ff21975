"""All evaluations that a configuration asks for, as one table of figures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from engine.config.schema import Config
from engine.data.bad_samples import BadRecord, summary
from engine.data.sources import open_source
from engine.data.transforms import pipeline
from engine.errors import UserError
from engine.evals import linear_probe, prompts, retrieval, zero_shot
from engine.evals.encode import Encoder
from engine.logs.report import Example
from engine.types import Metrics, Source

_NUM_EXAMPLES = 8  # images of the report's gallery


@dataclass
class Evaluations:
    """What scores a model of a run; every rank takes part and gets the same figures.

    ``probe_optimizer`` makes the optimizer of a linear probe by steps from parameters and a rate;
    ``stopped`` is asked between two evaluations whether to leave out the rest.
    """

    config: Config
    task: Any
    device: torch.device
    autocast: Callable[[], Any]
    warn: Callable[[str], None]
    probe_optimizer: Callable[..., torch.optim.Optimizer] | None = None
    stopped: Callable[[], bool] = lambda: False
    gallery: list[Example] = field(default_factory=list)  # of the latest call

    def __call__(self, model: nn.Module) -> Metrics:
        """``DATASET/metric`` → value, in percent; nothing where it was stopped on the way."""
        found: dict[str, float] = {}
        encoder = self._encoder(model)
        for name, evaluation in self._wanted():
            if self.stopped():
                return {}
            metrics, bad = evaluation(encoder)
            if bad:
                self.warn(f"{name}: {len(bad)} rows left out: {summary(bad)}")
            found |= {f"{name}/{metric}": value for metric, value in metrics.items()}
        return found

    def _wanted(self) -> list[tuple[str, Callable[[Encoder], tuple[Metrics, list[BadRecord]]]]]:
        wanted: list[tuple[str, Any]] = []
        if "text" in self.task.modalities:
            sets = self.config.data.valid_name, self.config.eval.zero_shot
            for names, evaluation in zip(sets, (self._retrieval, self._zero_shot), strict=True):
                wanted += [(name, partial(evaluation, name)) for name in names]
        if self.config.eval.linear_probe.train:
            wanted.append((f"{self.config.eval.linear_probe.train}_probe", self._linear_probe))
        return wanted

    def _encoder(self, model: nn.Module) -> Encoder:
        data, transforms = self.config.data, self.config.transforms
        key = "transforms.valid_transforms"
        return Encoder(
            self.task,
            model,
            pipeline.build(transforms.valid_transforms, transforms, key=key),
            self.device,
            batch_size=data.batch_size_val,
            num_workers=data.num_workers,
            max_pixels=data.max_image_pixels,
            autocast=self.autocast,
        )

    def _num_rows(self) -> int | None:
        data = self.config.data
        return data.valid_steps * data.batch_size_val if data.valid_steps else None

    def _retrieval(self, name: str, encoder: Encoder) -> tuple[Metrics, list[BadRecord]]:
        source = open_source(name, "valid", self.config.data, key="data.valid_name")
        found = retrieval.evaluate(
            encoder,
            source,
            num_rows=self._num_rows(),
            shuffle_words=self.config.eval.shuffle_words,
            seed=self.config.runner.seed,
            num_examples=_NUM_EXAMPLES,
        )
        self.gallery = [example(source, row, captions) for row, captions in found.examples]
        return found.metrics, found.bad

    def _zero_shot(self, name: str, encoder: Encoder) -> tuple[Metrics, list[BadRecord]]:
        chosen, key = self.config.eval.zero_shot[name], f"eval.zero_shot.{name}"
        source = open_source(chosen.dataset, "valid", self.config.data, key=f"{key}.dataset")
        texts = prompts.load(chosen.classes, chosen.templates, dataset=chosen.dataset, key=key)
        found = zero_shot.evaluate(encoder, source, texts, num_rows=self._num_rows())
        return found.metrics, found.bad

    def _linear_probe(self, encoder: Encoder) -> tuple[Metrics, list[BadRecord]]:
        probe = self.config.eval.linear_probe
        found = linear_probe.evaluate(
            encoder,
            self._labelled(probe.train, "train"),
            self._labelled(probe.valid or probe.train, "valid"),
            probe,
            optimizer=self.probe_optimizer,
            seed=self.config.runner.seed,
        )
        return found.metrics, found.bad

    def _labelled(self, name: str | None, split: Any) -> Source:
        key = f"eval.linear_probe.{split}"
        if name is None:
            raise UserError("name a dataset of labelled images", key=key)
        return open_source(name, split, self.config.data, key=key)


def example(source: Source, row: int, captions: list[tuple[int, float]]) -> Example:
    """An image with its own caption and those found for it, for the report's gallery."""
    shown = source[row]
    image = shown.image.read_bytes() if isinstance(shown.image, Path) else shown.image or b""
    found = [(source[other].caption, cosine) for other, cosine in captions]
    return Example(image, [shown.caption], found)
