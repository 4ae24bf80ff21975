"""open_clip's training as a process of its own, and its result by our retrieval figures.

    python -m tests.bench.peer_run --cfg FILE --steps N --output FILE [--towers same|own] \
        [--batch-size N] [section.key=value …]

The learning row runs this beside launch.py, so that both are measured alike.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import engine.torchvision_ops  # noqa: F401  before open_clip, which imports torchvision

import open_clip  # isort: skip
from engine.config.load import load
from engine.config.schema import Config
from engine.data.sources import open_source
from engine.data.transforms.pipeline import output_size
from engine.evals.predict import Predictor
from engine.evals.retrieval import RetrievalEvaluation
from engine.run import Run
from engine.train.precision import Precision
from engine.types import Batch, Sample, Task
from tests.bench.peer import CPU, Trainer


class PeerTask(Task):
    """Its model and tokenizer for our evaluation."""

    def __init__(self) -> None:
        self.words: Callable[..., Tensor] = open_clip.get_tokenizer("ViT-B-32")

    def batch(self, samples: list[Sample]) -> Batch:
        return {"image_BCHW": torch.stack([s.image for s in samples if s.image is not None])}

    def tokenize(self, texts: list[str]) -> Batch:
        return {"text": self.words(texts)}

    def encode(self, model: Any, batch: Batch, modality: str) -> Tensor:
        if modality == "image":
            return model.encode_image(batch["image_BCHW"], normalize=True)
        return model.encode_text(batch["text"], normalize=True)


def score(config: Config, model: nn.Module) -> dict[str, float]:
    """Our retrieval figures of the validation data, images by its own validation transform."""
    size = output_size(config.transforms.valid_transforms, config.transforms)[0]
    encoder = Predictor(
        PeerTask(),
        model,
        open_clip.image_transform(size, is_train=False),
        CPU,
        batch_size=config.data.batch_size_val,
        num_workers=config.data.num_workers,
        autocast=Precision.choose(config.dist, CPU).autocast,
    )
    found, evaluation = {}, RetrievalEvaluation(Run("clip", config, CPU))
    for name in config.data.valid_name:
        source = open_source(name, "valid", config.data, key="data.valid_name")
        metrics = evaluation.score(encoder, source).metrics
        found |= {f"{name}/{metric}": value for metric, value in metrics.items()}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cfg", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--towers", choices=("same", "own"), default="same")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_intermixed_args()
    config = load(options.cfg, options.overrides)
    torch.set_num_threads(config.dist.num_threads or torch.get_num_threads())
    trainer = Trainer(config, options.steps, options.batch_size, options.towers)
    trainer.run()
    options.output.write_text(json.dumps(score(config, trainer.model)), encoding="utf8")


if __name__ == "__main__":
    main()
