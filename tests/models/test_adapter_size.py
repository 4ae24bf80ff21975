"""Adapters of the reference recipe at its real size take little room beside their model."""

from pathlib import Path

import pytest
import torch
from torch import nn

from engine.config.load import load
from engine.models.parameters import WEIGHTS, add_lora, save_adapters
from engine.registry import find
from engine.train import optim
from tests.tasks.test_caption import byte_tokenizer, schema

RECIPE = Path(__file__).parents[2] / "configs" / "caption" / "gcc_lora_base_attn_ffn.yaml"
# What its tags name: no weights are there to be had, and sizes are all that counts.
FLAN_T5_BASE = {
    "model_type": "t5", "vocab_size": 32_128, "d_model": 768, "d_kv": 64, "d_ff": 2048,
    "num_decoder_layers": 12, "num_heads": 12, "feed_forward_proj": "gated-gelu",
}  # fmt: skip
CLIP_VIT_B16 = {
    "model_type": "clip_vision_model", "hidden_size": 768, "intermediate_size": 3072,
    "num_hidden_layers": 12, "num_attention_heads": 12, "patch_size": 16,
}  # fmt: skip


def make(config: schema.Config) -> nn.Module:
    """The recipe's model without storage."""
    image, decoder = config.model.image_encoder, config.model.decoder
    changed = {
        "image_encoder": image.model_copy(update={"pretrained": False, "param": CLIP_VIT_B16}),
        "decoder": decoder.model_copy(
            update={"pretrained": False, "tag": None, "config": FLAN_T5_BASE}
        ),
    }
    config = config.model_copy(update={"model": config.model.model_copy(update=changed)})
    tokenizer = byte_tokenizer.build(schema.Tokenizer(name="bytes"))
    with torch.device("meta"):
        return find("tasks", "caption").build(config, tokenizer).build_model()


def num_bytes(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def give_storage(model: nn.Module) -> None:
    """Zeros for what trains; the rest stays without."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                setattr(module, name, nn.Parameter(torch.zeros(parameter.shape)))


def test_adapters_take_at_most_two_percent_of_the_model(tmp_path: Path) -> None:
    config = load(RECIPE)
    model = make(config)
    whole = num_bytes(model.parameters())
    assert 8.5e8 < whole < 9.5e8  # 224 million weights in fp32; the head is the table of tokens
    patterns = [group.pattern for group in config.optim.groups if group.train == "lora"]
    assert config.optim.groups[0].train == "lora"  # nothing stands before it
    add_lora(model, patterns, [], config.model.lora)
    optim.freeze(model, config.optim)
    layers = sum("lora_A" in name for name, _ in model.named_parameters())
    assert layers == 12 * (4 + 4 + 3)  # self-attention, attention to the image, feed-forward
    give_storage(model)
    save_adapters(model, tmp_path, config.model.lora)
    size = (tmp_path / WEIGHTS).stat().st_size
    assert size > num_bytes(p for p in model.parameters() if p.requires_grad)  # and a header
    assert size <= 0.02 * whole
    assert size == pytest.approx(10.4e6, rel=0.05)  # 2.6 million weights, connector and all
