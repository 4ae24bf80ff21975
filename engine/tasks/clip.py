"""Contrastive pretraining of a dual encoder (CLIP; Radford et al. 2021, arXiv:2103.00020)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from engine.config.schema import Config
from engine.data.batch_memory import places, stack_images
from engine.data.text.augment import TextAugmenter
from engine.data.text.tokenizer import TextTokenizer, clean
from engine.data.transforms.geometry import square
from engine.data.transforms.pipeline import output_size
from engine.metrics.retrieval import batch_recall
from engine.models.dual_encoder import DualEncoder
from engine.types import Batch, Features, Sample, Task


class ClipTask(Task):
    """Image and text towers pulled together by a contrastive loss."""

    text_part = "text_encoder"
    modalities = ("image", "text")
    tokenizer: TextTokenizer

    def __init__(self, config: Config, tokenizer: TextTokenizer) -> None:
        super().__init__(config, tokenizer)
        self.loss = self.part("losses", "loss")
        self.augment = TextAugmenter(config.transforms.text_augment, tokenizer)
        # Mixup pairs rows inside a sub-batch, so their order may not be changed for speed.
        self.rows_interact = self.loss.mix(0, 0) is not None

    def build_model(self) -> DualEncoder:
        """Both towers, the projections and the loss's own scalars, on the CPU."""
        model, transforms = self.config.model, self.config.transforms
        size = square(output_size(transforms.train_transforms, transforms))
        ids = {"vocab_size": self.tokenizer.vocab_size, "pad_id": self.tokenizer.pad_id}
        size = model.image_encoder.image_size or size
        return DualEncoder(
            self.part("models/image", "model.image_encoder", image_size=size),
            self.part("models/text", "model.text_encoder", **ids),
            model.projection.dim,
            scalars=self.loss.parameters,
            bounds=self.loss.bounds,
            mean=transforms.normalize.mean,
            std=transforms.normalize.std,
        )

    def batch(self, samples: list[Sample]) -> Batch:
        """Collate: uint8 ``image_BCHW``, ``input_ids_BT`` and ``attention_mask_BT`` trimmed."""
        batch = self.tokenize([sample.row.caption for sample in samples])
        seeds = [sample.seed for sample in samples if sample.seed is not None]
        if self.augment.active and seeds:
            batch["input_ids_BT"], batch["attention_mask_BT"] = self.augment(
                batch["input_ids_BT"], batch["attention_mask_BT"], seeds
            )
        return batch | {"image_BCHW": stack_images(samples)} | places(samples)

    def tokenize(self, texts: list[str]) -> Batch:
        """Token ids and mask of cleaned texts."""
        max_length = self.config.model.text_encoder.max_length
        ids, mask = self.tokenizer(list(map(clean, texts)), max_length)
        return {"input_ids_BT": ids, "attention_mask_BT": mask}

    def features(self, model: Callable[..., Any], batch: Batch) -> Features:
        """L2-normed features of both towers; mixed as this step's draw says while training."""
        mix = self.loss.mix(batch["step"], self.config.runner.seed)
        outputs = model(batch, mix)
        shared = {name: outputs.pop(name) for name in self.loss.parameters}
        return Features(outputs, shared, {"lam": mix.lam} if mix else {})

    def losses(self, features: Features) -> dict[str, Tensor]:
        """The loss's named scalars; the batch's R@1 goes along as information."""
        features.info["batch_R@1"] = batch_recall(
            features.per_sample["image_BD"], features.per_sample["text_BD"]
        )
        return self.loss(features)

    def encode(self, model: Callable[..., Any], batch: Batch, modality: str) -> Tensor:
        """Features [B, D] of one modality, for evaluations; ``modality`` is image or text."""
        wanted = ("image_BCHW",) if modality == "image" else ("input_ids_BT", "attention_mask_BT")
        return model({name: batch[name] for name in wanted})[f"{modality}_BD"]


build = ClipTask
