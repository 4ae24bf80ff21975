"""transformers' Trainer with its VisionEncoderDecoderModel: a ViT, and GPT-2 that attends to it.

The model has the sizes of a configuration of ours whose decoder is a T5: as many layers, heads and
parameters, the same table of tokens. Samples lie in memory, as the collator wants them.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

import engine.torchvision_ops  # noqa: F401  before transformers, which imports torchvision

import transformers  # isort: skip
from engine.config.schema import Config
from engine.losses.language_model import IGNORED
from engine.types import Batch

Item = dict[str, Tensor]


def make_model(config: Config, vocab_size: int, image_size: int) -> Any:
    """From random weights; its image tower is frozen where ours is."""
    torch.manual_seed(config.runner.seed)
    sizes = {k: v for k, v in config.model.image_encoder.param.items() if k != "model_type"}
    t5 = config.model.decoder.config
    tower = transformers.ViTModel(
        transformers.ViTConfig(image_size=image_size, **sizes), add_pooling_layer=False
    )
    decoder = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=vocab_size,
            n_embd=t5["d_model"],
            n_layer=t5["num_decoder_layers"],
            n_head=t5["num_heads"],
            n_inner=3 * t5["d_ff"] // 2,  # two matrices, where T5's gate makes three
            n_positions=config.model.decoder.max_length,
            add_cross_attention=True,
            is_decoder=True,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    model = transformers.VisionEncoderDecoderModel(encoder=tower, decoder=decoder)
    model.config.pad_token_id = model.config.decoder_start_token_id = 0
    tower.requires_grad_(config.model.image_encoder.trainable)
    return model


def items(batches: list[Batch]) -> list[Item]:
    """The samples of our batches, in their order: uint8 image, and its caption's labels [T]."""
    return [
        {"image_CHW": image_CHW, "labels_T": labels_T[labels_T != IGNORED]}
        for batch in batches
        for image_CHW, labels_T in zip(batch["image_BCHW"], batch["labels_BT"], strict=True)
    ]


@dataclass(frozen=True, slots=True)
class Collate:
    """Normalised images, and labels padded to the longest of the batch, or to ``length``."""

    config: Config
    length: int | None = None

    def __call__(self, rows: list[Item]) -> Batch:
        normal = self.config.transforms.normalize
        mean_C11, std_C11 = (
            255 * torch.tensor(x).view(-1, 1, 1) for x in (normal.mean, normal.std)
        )
        image_BCHW = torch.stack([row["image_CHW"] for row in rows])
        labels_BT = pad_sequence(
            [row["labels_T"] for row in rows], batch_first=True, padding_value=IGNORED
        )
        if self.length is not None:
            more = self.length - labels_BT.shape[1]
            labels_BT = nn.functional.pad(labels_BT, (0, more), value=IGNORED)
        return {"pixel_values": (image_BCHW.float() - mean_C11) / std_C11, "labels": labels_BT}


class Clock(transformers.TrainerCallback):
    """Processor time when the steps begin: setting up is not counted."""

    started: float

    def on_epoch_begin(self, *unused: Any, **state: Any) -> None:
        """Before the first batch is fetched."""
        self.started = time.process_time()


def make_trainer(
    model: Any,
    rows: list[Item],
    config: Config,
    folder: Path,
    *,
    shuffled: bool = True,
    length: int | None = None,
) -> tuple[transformers.Trainer, Clock]:
    """A run over ``rows``, once, that is ready to start; nothing is saved or logged."""
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=config.data.batch_size,
        max_steps=len(rows) // config.data.batch_size,
        learning_rate=config.optim.lr.init,
        max_grad_norm=config.optim.grad_clip,
        train_sampling_strategy="random" if shuffled else "sequential",
        remove_unused_columns=False,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        use_cpu=True,
    )
    clock = Clock()
    trainer = transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        data_collator=Collate(config, length),
        callbacks=[clock],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer, clock
