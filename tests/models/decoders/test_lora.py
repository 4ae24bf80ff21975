"""Adapters in real decoders and an image tower: merged weights say what unmerged ones said."""

import pytest
import torch
from torch import nn

from engine.config.schema import ImageEncoder, Lora
from engine.models.decoders.language_model import DecoderInput
from engine.models.parameters import adapted_layers, add_lora, is_adapter, merge
from engine.registry import find
from tests.models.decoders.nll import nll
from tests.models.decoders.test_decoders import FAMILIES, make, make_texts

PATTERNS = {  # attention and feed-forward, as the recipes name them
    "t5_cross": r"(SelfAttention|EncDecAttention|DenseReluDense)\.(q|k|v|o|wi|wo)\.",
    "gpt2": r"\.(c_attn|c_proj|c_fc)\.",  # layers that keep their weights transposed
    "opt": r"\.(q_proj|k_proj|v_proj|out_proj|fc1|fc2)\.",
    "llama": r"\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)\.",
    "mpt": r"\.(Wqkv|out_proj|up_proj|down_proj)\.",
}
LAYERS = {"t5_cross": 10, "gpt2": 4, "opt": 6, "llama": 7, "mpt": 4}  # adapted in each of two


def adapt(model: nn.Module, pattern: str, *, stable: bool) -> None:
    add_lora(model, [pattern], [], Lora(rank=4, alpha=8, rank_stabilised=stable, dropout=0.5))
    model.float().eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():  # B starts at zero, where an adapter does nothing
        for name, parameter in model.named_parameters():
            if is_adapter(name):
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("stable", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_merged_decoder_says_the_same(family: str, stable: bool) -> None:
    decoder = make(family).float()
    image, ids, mask, labels = make_texts()
    image, names = image.float(), set(decoder.state_dict())
    prompt, seen = torch.full((3, 1), decoder.start_id), torch.ones(3, 1, dtype=torch.long)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}

    with torch.no_grad():
        plain = nll(decoder, image, ids, mask, labels)
        adapt(decoder, PATTERNS[family], stable=stable)
        assert sum(1 for _ in adapted_layers(decoder)) == 2 * LAYERS[family]
        before = nll(decoder, image, ids, mask, labels)
        said = decoder.generate(DecoderInput(image, prompt, seen), **options)
        merge(decoder)
        after = nll(decoder, image, ids, mask, labels)
    assert (before - plain).abs().max() > 1e-2  # adapters that do something
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    assert torch.equal(decoder.generate(DecoderInput(image, prompt, seen), **options), said)
    assert set(decoder.state_dict()) == names


@pytest.mark.parametrize("kind", ["vit", "clip_vision_model"])
def test_a_merged_image_tower_sees_the_same(kind: str) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    param = {"model_type": kind, "intermediate_size": 32, "patch_size": 4} | sizes
    tower = find("models/image", "huggingface").build(ImageEncoder(param=param), image_size=8)
    pixels = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        plain = tower.tokens(pixels)
        adapt(tower, r"(attention|attn|mlp|fc)", stable=True)
        before = tower.tokens(pixels)
        merge(tower)
        after = tower.tokens(pixels)
    assert (before - plain).abs().max() > 1e-2
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
