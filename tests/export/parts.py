"""Models whose parts transformers has, of random weights."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import AddedToken, processors

from engine.config import schema
from engine.config.schema import Resize, Transforms
from engine.data.text.tokenizer import BYTE_TOKENS, TextTokenizer, byte_level
from engine.models.parameters import add_token_rows
from engine.registry import find
from tests.export.models import opened

VIT = {"tag": "vit_tiny_patch16_224",
       "param": {"patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2}}  # fmt: skip
RESNET = {"tag": "resnet10t", "param": {"channels": [8, 16, 24, 32], "stem_width": 8}}
CLIP_VISION = {
    "name": "huggingface", "param": {
        "model_type": "clip_vision_model", "hidden_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "intermediate_size": 48, "patch_size": 16},
}  # fmt: skip
VIT_HF = {"name": "huggingface", "param": CLIP_VISION["param"] | {"model_type": "vit"}}
CLIP_TEXT = {"model_type": "clip_text_model", "hidden_size": 32, "num_hidden_layers": 1,
             "num_attention_heads": 2, "intermediate_size": 48}  # fmt: skip
T5 = {"model_type": "t5", "d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2,
      "num_decoder_layers": 1, "num_heads": 2}  # fmt: skip


def bytes_with_another_end() -> TextTokenizer:
    """CLIP's text encoder takes a 2, which ends our texts, for something else."""
    tokenizer = byte_level(split_words=False)
    tokenizer.add_special_tokens([AddedToken("[END]", special=True)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [END]", special_tokens=[("[CLS]", 1), ("[END]", 260)]
    )
    return TextTokenizer(tokenizer, BYTE_TOKENS | {"sep": "[END]"})


def make(
    task_name: str, image: dict[str, Any], more: dict[str, Any] | None = None, **sections: Any
):
    """A model of random weights that looks at what it is given; images of 32 × 48 pixels."""
    resize = Resize(size=(32, 32), interpolation="bicubic")
    transforms = Transforms(train_transforms=["resize"], valid_transforms=["resize"], resize=resize)
    config = schema.Config(**{
        "transforms": transforms,
        "model": schema.Model(image_encoder=schema.ImageEncoder(**image), **(more or {})),
    } | sections)  # fmt: skip
    tokenizer = bytes_with_another_end()
    task = find("tasks", task_name).build(config, tokenizer)
    torch.manual_seed(0)
    model = task.build_model()
    add_token_rows(model, config.optim.groups, tokenizer.token_id)
    model.eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and not name.startswith("image_encoder.model.pos"):
            parameter.mul_(4)
    return opened(task_name, config, task, model)
