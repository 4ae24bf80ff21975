"""open_clip 3.3's training, as it comes: its loop, loss, schedule, transforms, tokenizer, loader.

Trains on the data that a YAML of ours names. ``same`` towers: those of that YAML, of which only
the table of tokens has another size (open_clip's tokenizer has 49,408); ``own`` towers: open_clip's
CLIP with a ViT of 4 × 128 and a text transformer of 3 × 128. Data set and optimizer are made after
``open_clip_train/data.py`` and ``main.py``, which cannot be imported without webdataset.
"""

from __future__ import annotations

import itertools
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import engine.torchvision_ops  # noqa: F401  before open_clip, which imports torchvision

import open_clip  # isort: skip
from engine.config.schema import Config
from engine.data.loader import default_workers
from engine.data.sources import open_source
from engine.data.transforms.pipeline import output_size
from engine.models.dual_encoder import DualEncoder
from engine.registry import find
from engine.train.precision import Precision
from tests.data.formats.folders import image

CPU = torch.device("cpu")
CONTEXT = 77  # its default, for every caption
RATE, WARMUP = 1e-3, 0.05  # twice its default rate; warm-up as a share of all steps


class SameTowers(nn.Module):
    """The engine's dual encoder, as open_clip's loop and loss want a model."""

    def __init__(self, towers: DualEncoder) -> None:
        super().__init__()
        self.towers = towers
        self.logit_scale = towers.logit_scale

    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        return self.towers({"image_BCHW": image})["image_BD"]

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        mask = text.ne(0).long()  # as its HFTextEncoder makes it
        return self.towers({"input_ids_BT": text, "attention_mask_BT": mask})["text_BD"]

    def forward(self, image: Tensor, text: Tensor) -> dict[str, Tensor]:
        return {
            "image_features": self.encode_image(image),
            "text_features": self.encode_text(text),
            "logit_scale": self.logit_scale.exp(),
        }


class CsvDataset(Dataset):
    """After its class of this name: an image opened, a caption tokenized, one sample at a time."""

    def __init__(self, images: list[str], captions: list[str], transforms: Any, tokenizer: Any):
        self.images, self.captions = images, captions
        self.transforms, self.tokenize = transforms, tokenizer

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        images = self.transforms(Image.open(self.images[index]))
        return images, self.tokenize([self.captions[index]])[0]


@dataclass
class Limited:
    """Its ``DataInfo``, over the first batches of a loader only."""

    loader: DataLoader
    num_batches: int

    @property
    def dataloader(self) -> Limited:
        return self

    @property
    def num_samples(self) -> int:
        return self.num_batches * (self.loader.batch_size or 1)

    def set_epoch(self, epoch: int) -> None:
        """It has no sampler to tell."""

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(self.loader, self.num_batches)


def make_model(config: Config, towers: str) -> nn.Module:
    """``same`` or ``own`` towers from random weights."""
    torch.manual_seed(config.runner.seed)
    size = output_size(config.transforms.train_transforms, config.transforms)[0]
    if towers == "own":
        return open_clip.model.CLIP(
            config.model.projection.dim,
            {"layers": 4, "width": 128, "head_width": 32, "patch_size": 16, "image_size": size},
            {"context_length": CONTEXT, "layers": 3, "width": 128, "heads": 4},
            output_dict=True,
        )
    text = config.model.text_encoder.model_copy(update={"max_length": CONTEXT})
    loss = find("losses", "nce").build(config.loss)
    return SameTowers(
        DualEncoder(
            find("models/image", config.model.image_encoder.name).build(
                config.model.image_encoder, image_size=size
            ),
            find("models/text", text.name).build(text, vocab_size=49_408, pad_id=0),
            config.model.projection.dim,
            scalars=loss.parameters,
            bounds=loss.bounds,
            mean=config.transforms.normalize.mean,
            std=config.transforms.normalize.std,
        )
    )


def make_loader(config: Config, batch_size: int, workers: int | None = None) -> DataLoader:
    """Its training loader over the training data of ``config``."""
    sources = [
        open_source(name, "train", config.data, key="data.train_name")
        for name in config.data.train_name
    ]
    records = [source[row] for source in sources for row in range(len(source))]
    size = output_size(config.transforms.train_transforms, config.transforms)[0]
    dataset = CsvDataset(
        [str(image(record)) for record in records],
        [record.caption for record in records],
        open_clip.image_transform(size, is_train=True),
        open_clip.get_tokenizer("ViT-B-32"),
    )
    return DataLoader(
        dataset,
        batch_size=min(batch_size, len(dataset)),
        shuffle=True,
        num_workers=default_workers(1) if workers is None else workers,
        drop_last=True,
    )


class Trainer:
    """Its ``train_one_epoch`` with its defaults: AdamW 0.9, 0.98, 1e-6, decay 0.2; cosine."""

    def __init__(self, config: Config, steps: int, batch_size: int, towers: str = "same") -> None:
        from open_clip_train.scheduler import cosine_lr

        self.model = make_model(config, towers)
        self.loader = make_loader(config, batch_size, config.data.num_workers)
        self.steps, self.loss = steps, open_clip.ClipLoss()
        self.optimizer = make_optimizer(self.model)
        self.schedule = cosine_lr(self.optimizer, RATE, max(1, round(WARMUP * steps)), steps)
        bf16 = Precision.choose(config.dist, CPU).name == "bf16"
        self.args = Namespace(
            device="cpu", precision="amp_bf16" if bf16 else "fp32", distill=False, accum_freq=1,
            skip_scheduler=False, horovod=False, grad_clip_norm=None, rank=0, local_rank=0,
            world_size=1, batch_size=self.loader.batch_size, log_every_n_steps=100, wandb=False,
        )  # fmt: skip

    def run(self) -> int:
        """Train to the end; returns the number of samples seen."""
        from open_clip_train.train import train_one_epoch

        epoch, left, whole = 0, self.steps, len(self.loader)
        while left:
            data = {"train": Limited(self.loader, min(left, whole))}
            # it counts steps as epoch × batches, which holds for the cut last epoch as well
            start = epoch * whole / data["train"].num_batches
            train_one_epoch(
                self.model, data, self.loss, start, self.optimizer, None, self.schedule, None,
                self.args,
            )  # fmt: skip
            epoch, left = epoch + 1, left - data["train"].num_batches
        return self.steps * int(self.loader.batch_size or 0)


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """No decay for gains, biases and the temperature, by its own rule."""

    def exclude(name: str, p: Tensor) -> bool:
        words = ("bn", "ln", "bias", "logit_scale")
        return p.ndim < 2 or any(word in name for word in words)

    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for n, p in named if exclude(n, p)], "weight_decay": 0.0},
        {"params": [p for n, p in named if not exclude(n, p)], "weight_decay": 0.2},
    ]
    return torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.98), eps=1e-6)
