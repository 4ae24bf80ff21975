"""The estimate of memory and the count of FLOPs, against cases counted by hand."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from engine.config import schema
from engine.models import memory
from engine.models.dual_encoder import DualEncoder
from engine.models.image import timm as timm_encoder
from engine.models.text import huggingface


class Layers(nn.Module):
    """Two linear layers with a GELU between: what backward needs is known."""

    def __init__(self, trained: bool = True) -> None:
        super().__init__()
        self.one = nn.Linear(8, 16, bias=False).requires_grad_(trained)
        self.two = nn.Linear(16, 4, bias=False).requires_grad_(trained)

    def forward(self, batch):
        return {"image_BD": self.two(F.gelu(self.one(batch["x_BD"])))}


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24, bias=False)

    def forward(self, batch):
        q, k, v = self.qkv(batch["x_BTD"]).view(-1, 5, 3, 2, 4).permute(2, 0, 3, 1, 4)
        return {"image_BD": F.scaled_dot_product_attention(q, k, v)}


def dual_encoder(**image_options) -> DualEncoder:
    torch.manual_seed(0)
    param = {"depth": 2, "embed_dim": 32, "num_heads": 2, "patch_size": 8}
    image = schema.ImageEncoder(tag="vit_tiny_patch16_224", param=param, **image_options)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = schema.TextEncoder(config={"model_type": "bert", "intermediate_size": 64, **sizes})
    return DualEncoder(
        timm_encoder.build(image, image_size=32),
        huggingface.build(text, vocab_size=100, pad_id=0),
        16, {"logit_scale": (1.0, True)}, {}, (0.5,) * 3, (0.5,) * 3,
    )  # fmt: skip


def batch(rows=4):
    return {
        "image_BCHW": torch.randint(256, (rows, 3, 32, 32), dtype=torch.uint8),
        "input_ids_BT": torch.randint(1, 100, (rows, 6)),
        "attention_mask_BT": torch.ones(rows, 6, dtype=torch.int64),
    }


def test_saved_bytes_by_hand():
    x = {"x_BD": torch.randn(6, 8)}
    # input (8), before GELU (16), after it (16), each a row of fp32
    assert memory.saved_bytes(Layers(), x) == 6 * (8 + 16 + 16) * 4
    assert memory.saved_bytes(Layers(trained=False), x) == 0


def test_estimate_by_hand():
    x = {"x_BD": torch.randn(64, 8)}
    found = memory.estimate_memory(Layers(), x, 1000, dim=4, tile=100)
    weights = 4 * (8 * 16 + 16 * 4)
    assert (found["weights"], found["gradients"], found["optimizer"]) == (
        weights,
        weights,
        2 * weights,
    )
    assert found["activations"] == 1000 * 40 * 4
    assert found["loss"] == 4 * (4 * 1000 * 4 + 2 * 100 * 100)
    assert sum(found.values()) == 4 * weights + found["activations"] + found["loss"]


def test_estimate_scales_with_the_batch_to_what_is_measured():
    model, large = dual_encoder(), batch(16)
    measured = memory.saved_bytes(model, large)
    estimated = memory.estimate_memory(model, large, 16)["activations"]
    assert estimated == pytest.approx(measured, rel=0.02)


def test_half_precision_needs_less_and_a_frozen_tower_little():
    model, data = dual_encoder(), batch()
    full = memory.estimate_memory(model, data, 256)
    half = memory.estimate_memory(model, data, 256, dtype=torch.bfloat16)
    assert 0.4 < half["activations"] / full["activations"] < 0.8
    frozen = memory.estimate_memory(dual_encoder(trainable=False), data, 256)
    assert frozen["activations"] < 0.5 * full["activations"]
    assert frozen["gradients"] < full["gradients"]
    assert frozen["weights"] == full["weights"]


def test_checkpointing_needs_less():
    plain = memory.estimate_memory(dual_encoder(), batch(), 64)["activations"]
    less = memory.estimate_memory(dual_encoder(gradient_checkpointing=True), batch(), 64)
    assert less["activations"] < 0.7 * plain


def test_too_few_samples_are_an_error():
    with pytest.raises(ValueError, match="needs 2 samples"):
        memory.estimate_memory(Layers(), {"x_BD": torch.randn(1, 8)}, 10)


def test_flops_by_hand():
    x = {"x_BD": torch.randn(6, 8)}
    forward = 2 * 6 * (8 * 16 + 16 * 4)
    assert memory.count_flops(Layers().requires_grad_(False), x) == forward
    # backward: each layer's weight gradient, and the input's gradient of the second alone
    assert memory.count_flops(Layers(), x) == forward * 2 + 2 * 6 * 16 * 4


def test_flops_of_attention_by_hand():
    x = {"x_BTD": torch.randn(3, 5, 8)}
    linear, products = 2 * 15 * 8 * 24, 2 * 2 * (3 * 2) * 5 * 5 * 4
    assert memory.count_flops(Attention().requires_grad_(False), x) == linear + products
    assert memory.count_flops(Attention(), x) == 2 * linear + 3 * products


def test_flops_are_linear_in_the_batch():
    model = dual_encoder()
    assert memory.count_flops(model, batch(6)) == 3 * memory.count_flops(model, batch(2))


class Counting(Layers):
    """Counts its forward passes in a buffer, as batch norm does."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("passes", torch.zeros(1))

    def forward(self, batch):
        self.passes.add_(1)
        return super().forward({"x_BD": F.dropout(batch["x_BD"], 0.5, self.training)})


def test_nothing_is_left_changed():
    model, x = Counting().eval(), {"x_BD": torch.randn(4, 8)}
    model.one.weight.grad = torch.full((16, 8), 7.0)
    state = {name: t.clone() for name, t in model.state_dict().items()}
    random = torch.get_rng_state()
    memory.estimate_memory(model, x, 8)
    memory.count_flops(model, x)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(state[name], t) for name, t in model.state_dict().items())
    assert not any(module.training for module in model.modules())
    assert (model.one.weight.grad == 7).all()
    assert model.two.weight.grad is None
