"""Small models of every task that exports, with random weights that look at what they are given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine.config import schema
from engine.config.schema import Export, Resize, Transforms
from engine.data.text import bytes as byte_tokenizer
from engine.export import onnx
from engine.registry import find
from engine.run import Run
from engine.train.checkpoint import Checkpoint
from engine.types import Task

SIZE = 32
IMAGE = schema.ImageEncoder(
    tag="vit_tiny_patch16_224",
    param={"patch_size": 16, "embed_dim": 32, "depth": 1, "num_heads": 2},
)
TEXT = {"model_type": "modernbert", "hidden_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "intermediate_size": 48, "max_position_embeddings": 64,
        "local_attention": 8, "layer_types": ["full_attention", "sliding_attention"]}  # fmt: skip
GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 40}
LLAMA = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
         "intermediate_size": 48}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "clip": {"text_encoder": schema.TextEncoder(config=TEXT, pool="last", max_length=24),
             "projection": schema.Projection(dim=16)},
    "caption": {"decoder": schema.Decoder(name="causal", config=GPT2, max_length=30)},
    "recognize": {"decoder": schema.Decoder(name="truncated", config=LLAMA, max_length=64),
                  "connector": schema.Connector(name="linear", keep_cls=False,
                                                positions="sincos2d")},
}  # fmt: skip


def configuration(task: str, **sections: Any) -> schema.Config:
    resize = Resize(size=(SIZE, SIZE), interpolation="bicubic")
    transforms = Transforms(train_transforms=["resize"], valid_transforms=["resize"], resize=resize)
    model = schema.Model(image_encoder=IMAGE, **MODELS[task])
    return schema.Config(transforms=transforms, model=model, **sections)


def opened(task_name: str, config: schema.Config, task: Task, model: nn.Module) -> Run:
    """A run that a checkpoint of step 7 was left by."""
    run = Run(task_name, config, torch.device("cpu"))
    run.task, run.model, run.checkpoint = task, model, Checkpoint(Path("a run"), 7)
    return run


def make(task_name: str, **sections: Any) -> Run:
    """A model that tells one image from another, from random weights."""
    config = configuration(task_name, **sections)
    tokenizer = byte_tokenizer.build(schema.Tokenizer(name="bytes"))
    task = find("tasks", task_name).build(config, tokenizer)
    torch.manual_seed(0)
    model = task.build_model().eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and not name.startswith("image_encoder.model.pos"):
            parameter.mul_(4)
    return opened(task_name, config, task, model)


def export(trained: Run, folder: Path, **options: Any) -> Path:
    onnx.build(trained, folder, Export(**options), "export.output")
    return folder


def uint8(pixels: list[Any]) -> Tensor:
    """uint8 BCHW of what ``Preprocess.pixels`` gives."""
    return torch.stack([torch.from_numpy(one.copy()).permute(2, 0, 1) for one in pixels])
