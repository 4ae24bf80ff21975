"""A recognition task and a model of a few thousand random weights, in fp64, that labels images."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from engine.config import schema
from engine.data.text import bytes as byte_tokenizer
from engine.models.vision_language import Recognizer
from engine.registry import find
from engine.tasks.recognize import RecognizeTask
from tests.generate.speaker import Pixels

SIZES = {
    "model_type": "llama", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 32,
}  # fmt: skip


def labeller(**decoder: Any) -> tuple[RecognizeTask, Recognizer]:
    """The separator comes easily, so that many labels end."""
    options = {"name": "truncated", "config": SIZES, "max_length": 12} | decoder
    config = schema.Config(
        data=schema.Data(labels=schema.Labels(prompt="It has", train_prompts=[])),
        model=schema.Model(decoder=schema.Decoder(**options)),
    )
    task = RecognizeTask(config, byte_tokenizer.build(schema.Tokenizer()))
    torch.manual_seed(0)
    made = find("models/decoders", "truncated").build(
        task.config.model.decoder, vocab_size=task.tokenizer.vocab_size,
        pad_id=task.tokenizer.pad_id, eos_id=task.eos_id,
    )  # fmt: skip
    task.start_id = made.start_id
    model = Recognizer(
        Pixels(), nn.Linear(16, made.width), made, layer=-1, keep_prefix=True,
        label_smoothing=0.0, mean=[0.4] * 3, std=[0.3] * 3,
    ).double().eval().requires_grad_(False)  # fmt: skip
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.mul_(8)
    made.head()[0][task.separator_id] *= 3
    return task, model
