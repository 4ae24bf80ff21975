"""A small model of --task=vqa for tests: bytes as tokens, patches as its image encoder."""

from __future__ import annotations

import torch
from torch import nn

from engine.config import schema
from engine.data.text import bytes as byte_tokenizer
from engine.models.vision_language import VisionLanguage
from engine.registry import find
from engine.run import Run

SIZE, PATCH = 16, 8
DECODERS = {
    "t5": {
        "model_type": "t5", "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2,
        "dropout_rate": 0.1, "feed_forward_proj": "gated-gelu",
    },
    "causal": {
        "model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 400,
    },
}  # fmt: skip


class Patches(nn.Module):
    """Four tokens of an image; counts the images that it has seen."""

    token_width, num_prefix_tokens = 6, 0

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 6, PATCH, PATCH)
        self.seen = 0

    def tokens(self, image_BCHW, layer):
        self.seen += len(image_BCHW)
        return torch.tanh(self.layer(image_BCHW)).flatten(2).transpose(1, 2)


def config(decoder="t5", template="vqa_plain", **sections):
    """The configuration of a run of --task=vqa on images of 16 × 16."""
    return schema.Config.model_validate({
        "data": {"prompt": {"template": template}, "num_workers": 0, "batch_size_val": 4},
        "transforms": {
            "train_transforms": ["resize"],
            "valid_transforms": ["resize"],
            "resize": {"size": [SIZE, SIZE]},
        },
        "model": {
            "decoder": {"name": decoder, "config": DECODERS[decoder], "max_length": 390},
        },
        **sections,
    })  # fmt: skip


def make(decoder="t5", template="vqa_plain", *, dtype=torch.float64, **sections):
    """(task, model): weights large enough that the model looks at what it is shown."""
    torch.manual_seed(0)
    tokenizer = byte_tokenizer.build(schema.Tokenizer(name="bytes"))
    task = find("tasks", "vqa").build(config(decoder, template, **sections), tokenizer)
    speaker = find("models/decoders", decoder).build(
        task.config.model.decoder, vocab_size=tokenizer.vocab_size, pad_id=tokenizer.pad_id,
        eos_id=task.eos_id,
    )  # fmt: skip
    task.start_id = speaker.start_id
    model = VisionLanguage(
        Patches(), nn.Linear(6, speaker.width), speaker, layer=-1, keep_prefix=True,
        label_smoothing=0.0, mean=[0.4] * 3, std=[0.3] * 3,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(2)
    return task, model.to(dtype).eval()


def run():
    """A run of --task=vqa that nothing has been opened for."""
    return Run("vqa", config(), torch.device("cpu"))


def noise(count, seed=0, dtype=torch.float64):
    """Images of noise, floats of 0 … 1: [count, 3, 16, 16]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, SIZE, SIZE, generator=generator, dtype=dtype)
