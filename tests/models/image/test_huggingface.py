"""Image encoders of transformers: tokens, pooling, weights, and what is said of mistakes."""

import pytest
import torch

from engine.config import schema
from engine.errors import UserError
from engine.models.image import timm as timm_encoder
from engine.models.image.huggingface import HuggingfaceImageEncoder, build
from engine.models.vision_language import freeze_unused
from engine.models.weights import load_tower
from engine.registry import find

import transformers  # isort: skip  the encoder's module has made its import safe

SIZES = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
    "patch_size": 8,
}  # fmt: skip
KINDS = {"clip_vision_model": 1, "siglip_vision_model": 0, "vit": 1, "deit": 2}  # prefix tokens


def encoder(kind="clip_vision_model", image_size=32, **options) -> HuggingfaceImageEncoder:
    torch.manual_seed(0)
    options = {"param": {"model_type": kind, **SIZES}, **options}
    return build(schema.ImageEncoder(name="huggingface", **options), image_size=image_size)


def images(rows=2, size=32):
    return torch.randn(rows, 3, size, size, generator=torch.Generator().manual_seed(1))


def test_its_name_finds_it():
    assert find("models/image", "huggingface").build is build


@pytest.mark.parametrize(("kind", "prefix"), KINDS.items())
def test_families_give_tokens_and_one_vector(kind, prefix):
    model = encoder(kind).eval()
    assert (model.width, model.token_width, model.num_prefix_tokens) == (16, 16, prefix)
    x = images()
    whole = model.model(pixel_values=x, output_hidden_states=True)
    assert model.tokens(x).shape == (2, 16 + prefix, 16)
    assert torch.equal(model.tokens(x), whole.last_hidden_state)
    assert torch.equal(model.tokens(x, -2), whole.hidden_states[-2])
    assert model(x).shape == (2, 16)
    mean = encoder(kind, pool="mean").eval()
    want = mean.tokens(x)[:, prefix:].mean(1)
    torch.testing.assert_close(mean(x), want)


def test_the_class_token_is_pooled_as_the_model_does():
    x = images()
    clip, vit = encoder().eval(), encoder("vit").eval()
    normed = clip.model.vision_model.post_layernorm if hasattr(
        clip.model, "vision_model") else clip.model.post_layernorm  # fmt: skip
    torch.testing.assert_close(clip(x), normed(clip.tokens(x)[:, 0]))
    assert torch.equal(vit(x), vit.tokens(x)[:, 0])


def test_frozen_stays_in_evaluation_mode_without_gradients():
    model = encoder(trainable=False).train()
    assert not model.training and not any(p.requires_grad for p in model.parameters())


def test_gradient_checkpointing_changes_no_gradient():
    grads = []
    for checkpointing in (False, True):
        model = encoder(gradient_checkpointing=checkpointing).train()
        model.tokens(images()).square().mean().backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) > 20
    assert all(torch.allclose(grads[0][n], g, atol=1e-6) for n, g in grads[1].items())


@pytest.fixture
def folder(tmp_path):
    """A whole CLIP, of which the vision half is wanted."""
    text = {
        "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 16, "vocab_size": 9, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    config = transformers.CLIPConfig(text_config=text, vision_config={**SIZES, "image_size": 32})
    torch.manual_seed(0)
    model = transformers.CLIPModel(config).eval()
    model.save_pretrained(tmp_path)
    return tmp_path, model


def test_the_vision_half_of_a_clip_is_loaded(folder, recwarn):
    path, clip = folder
    model = encoder(tag=str(path), param={}, pretrained=True).eval()
    want = clip.vision_model(pixel_values=images())
    torch.testing.assert_close(model.tokens(images()), want.last_hidden_state)
    torch.testing.assert_close(model(images()), want.pooler_output)
    assert not [w for w in recwarn if "lack" in str(w.message)]
    random = encoder(tag=str(path), param={}).eval()
    assert not torch.allclose(random(images()), model(images()))


def test_a_tower_of_another_run_is_taken():
    source, target = encoder(), encoder(param={"model_type": "clip_vision_model", **SIZES})
    tensors = {f"image_encoder.{n}": t + 1 for n, t in source.state_dict().items()}
    load_tower(target, tensors, "image_encoder", key="k")
    assert all(torch.equal(t + 1, target.state_dict()[n]) for n, t in source.state_dict().items())


@pytest.mark.parametrize(
    ("options", "key", "told"),
    [
        ({"param": {"model_type": "clip_vision"}}, "param.model_type", "clip_vision_model"),
        ({"param": {"model_type": "bert"}}, "param.model_type", "not a vision transformer"),
        ({"param": {"model_type": "vit", "hiden_size": 8}}, "param.hiden_size", "hidden_size"),
        (
            {"param": {"model_type": "clip_vision_model", **SIZES, "num_attention_heads": 3}},
            "param", "transformers cannot build|refuses its options",
        ),
        ({"embedding_dim": 99}, "embedding_dim", "vectors of 16 numbers, not 99"),
        ({"patch_drop": 0.5}, "patch_drop", "cannot drop patches"),
        (
            {"pool": "cls", "param": {"model_type": "siglip_vision_model", **SIZES}},
            "pool", "no class token",
        ),
        ({"tag": "/nowhere", "param": {}, "pretrained": True}, "tag", "cannot get image encoder"),
    ],
)  # fmt: skip
def test_mistakes_are_named_with_their_key(options, key, told):
    with pytest.raises(UserError, match=told) as caught:
        encoder(**options)
    assert caught.value.key == f"model.image_encoder.{key}"


def test_a_folder_without_weights_is_told(folder):
    path, _ = folder
    (path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no file named model\.safetensors") as caught:
        encoder(tag=str(path), param={}, pretrained=True)
    assert caught.value.key == "model.image_encoder.tag"


def test_images_of_another_size_are_told(folder):
    path, _ = folder
    with pytest.raises(UserError, match=r"takes images of 32 pixels.*put out 48") as caught:
        encoder(tag=str(path), param={}, image_size=48)
    assert caught.value.key == "model.image_encoder.image_size"
    with pytest.raises(UserError, match="48 × 48 pixels, but the image encoder takes 32 × 32"):
        encoder()(images(size=48))


def tiny_vit():
    param = {"depth": 3, "embed_dim": 16, "num_heads": 2, "patch_size": 8}
    config = schema.ImageEncoder(tag="vit_tiny_patch16_224", param=param)
    return timm_encoder.build(config, image_size=32)


@pytest.mark.parametrize("make", [encoder, tiny_vit])
@pytest.mark.parametrize("layer", [-1, -2])
def test_what_lies_behind_the_layer_is_frozen(make, layer):
    model = make().train()
    freeze_unused(model, layer, (32, 32))
    assert model.training
    model.tokens(images(), layer).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None), name
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    last = "layers.1." if make is encoder else "blocks.2."
    assert any(last in name for name in frozen) == (layer == -2)


@pytest.mark.parametrize("make", [encoder, tiny_vit])
def test_a_layer_that_is_not_there_is_told(make):
    with pytest.raises(UserError, match="no hidden layer -9") as caught:
        freeze_unused(make(), -9, (32, 32))
    assert caught.value.key == "model.connector.layer"
