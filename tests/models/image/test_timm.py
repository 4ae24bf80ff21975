"""timm image encoders: construction, pooling, freezing and what is said of mistakes."""

import copy
import socket
import warnings

import pytest
import torch

from engine.config import schema
from engine.errors import UserError
from engine.models.image.timm import TimmImageEncoder, build
from engine.registry import find

import timm  # isort: skip  the encoder's module has made its import safe

TINY = {"depth": 2, "embed_dim": 32, "num_heads": 2, "patch_size": 8}


def encoder(image_size=32, **options) -> TimmImageEncoder:
    torch.manual_seed(0)
    options = {"tag": "vit_tiny_patch16_224", "param": TINY, **options}
    return build(schema.ImageEncoder(**options), image_size=image_size)


def images(rows=2, size=32):
    return torch.randn(rows, 3, size, size, generator=torch.Generator().manual_seed(1))


def test_both_names_find_it():
    for name in ("timm", "timm_modelzoo"):
        assert find("models/image", name).build is build


def test_cls_token_is_the_default_and_equals_timm():
    model = encoder().eval()
    x = images()
    tokens = model.tokens(x)
    assert tokens.shape == (2, 17, 32)
    assert (model.width, model.num_prefix_tokens) == (32, 1)
    assert torch.equal(model(x), tokens[:, 0])


def test_a_deprecated_tag_works_and_is_quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = encoder(tag="vit_base_patch16_224_in21k", embedding_dim=32)
    assert model.width == 32


def test_mean_leaves_the_class_token_out():
    model = encoder(pool="mean").eval()
    x = images()
    assert torch.allclose(model(x), model.tokens(x)[:, 1:].mean(1), atol=1e-6)


def test_auto_prefers_the_class_token_to_the_models_own_mean():
    model = encoder(tag="beit_base_patch16_224", param={**TINY, "patch_size": 16}).eval()
    x = images()
    normed = model.model.fc_norm(model.tokens(x)[:, 0])
    assert torch.allclose(model(x), normed, atol=1e-6)
    own = encoder(tag="beit_base_patch16_224", param={**TINY, "patch_size": 16}, pool="model")
    assert own.model.global_pool == "avg"


def test_a_given_global_pool_is_kept():
    model = encoder(param={**TINY, "global_pool": "avg", "class_token": False})
    assert (model.num_prefix_tokens, model.model.global_pool) == (0, "avg")
    assert model.tokens(images()).shape == (2, 16, 32)


@pytest.mark.parametrize(
    ("tag", "param", "tokens"),
    [
        ("resnet10t", {}, (2, 1, 512)),
        ("convnext_atto", {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)}, (2, 1, 16)),
        ("mobilenetv3_small_050", {}, (2, 1, 288)),
        ("swin_tiny_patch4_window7_224", {"embed_dim": 12, "depths": (1, 1, 1, 1)}, (2, 1, 96)),
        ("vit_base_patch16_siglip_224", TINY, (2, 16, 32)),
        ("deit_tiny_distilled_patch16_224", TINY, (2, 18, 32)),
    ],
)
def test_families_give_their_width_their_tokens_and_a_gradient_everywhere(tag, param, tokens):
    model = encoder(tag=tag, param=param)
    x = images()
    features = model(x)
    assert features.shape == (2, model.width)
    features.sum().backward()
    # a parameter without a gradient would stop distributed data parallel training
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert model.eval().tokens(x).shape == tokens


def test_frozen_stays_in_evaluation_mode_without_gradients():
    model = encoder(tag="resnet10t", param={}, trainable=False).train()
    before = copy.deepcopy(model.state_dict())
    x = images(4)
    first, second = model(x), model(x)
    assert torch.equal(first, second)
    assert not first.requires_grad
    assert not any(module.training for module in model.modules())
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_trainable_follows_train_and_eval():
    model = encoder(param={**TINY, "proj_drop_rate": 0.5})
    assert model.training
    x = images()
    assert not torch.equal(model(x), model(x))
    assert torch.equal(model.eval()(x), model(x))


def test_patch_drop_shortens_training_only():
    model = encoder(patch_drop=0.5)
    x = images()
    assert model.train().tokens(x).shape == (2, 1 + 8, 32)
    assert model.eval().tokens(x).shape == (2, 1 + 16, 32)


def test_gradient_checkpointing_changes_no_gradient():
    plain, checkpointed = encoder(), encoder(gradient_checkpointing=True)
    assert checkpointed.model.grad_checkpointing
    x = images()
    for model in (plain, checkpointed):
        model(x).square().sum().backward()
    pairs = zip(plain.parameters(), checkpointed.parameters(), strict=True)
    assert all(torch.allclose(a.grad, b.grad, atol=1e-6) for a, b in pairs)


def pretrained_file(path, size=32, **changes) -> str:
    from safetensors.torch import save_file

    torch.manual_seed(3)
    model = timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, img_size=size, **{**TINY, **changes}
    )
    save_file(model.state_dict(), path)
    return str(path)


def test_pretrained_weights_load_and_positions_are_resampled(tmp_path):
    overlay = {"file": pretrained_file(tmp_path / "w.safetensors")}
    param = {**TINY, "pretrained_cfg_overlay": overlay}
    same = encoder(32, param=param, pretrained=True)
    larger = encoder(64, param=param, pretrained=True)
    assert torch.equal(larger.model.blocks[1].mlp.fc1.weight, same.model.blocks[1].mlp.fc1.weight)
    assert larger.model.pos_embed.shape == (1, 1 + 64, 32)
    small_HW = same.model.pos_embed[0, 1:].view(4, 4, 32)
    large_HW = larger.model.pos_embed[0, 1:].view(8, 8, 32)
    pooled = large_HW.view(4, 2, 4, 2, 32).mean((1, 3))
    assert torch.nn.functional.cosine_similarity(pooled, small_HW, dim=-1).min() > 0.9
    assert larger(images(size=64)).shape == (2, 32)


def test_weights_that_a_pretrained_file_lacks_are_named(tmp_path):
    overlay = {"file": pretrained_file(tmp_path / "w.safetensors", depth=1)}
    with pytest.warns(UserWarning, match=r"lack blocks\.1\..*random"):
        encoder(param={**TINY, "pretrained_cfg_overlay": overlay}, pretrained=True)


def test_pretrained_weights_of_another_width_are_refused(tmp_path):
    overlay = {"file": pretrained_file(tmp_path / "w.safetensors")}
    param = {**TINY, "embed_dim": 16, "pretrained_cfg_overlay": overlay}
    with pytest.raises(UserError, match="size mismatch") as caught:
        encoder(param=param, pretrained=True)
    assert caught.value.key == "model.image_encoder.param"


def test_weights_that_cannot_be_downloaded_say_what_to_do(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("reached for the network"))
    with pytest.raises(UserError, match="HF_HOME") as caught:
        encoder(tag="vit_tiny_patch16_224.augreg_in21k", param={}, pretrained=True)
    assert caught.value.key == "model.image_encoder.pretrained"


@pytest.mark.parametrize(
    ("options", "key", "words"),
    [
        ({"tag": "vit_tiny_patch16_244"}, "tag", "did you mean 'vit_tiny_patch16_"),
        ({"tag": "zzz"}, "tag", "no model 'zzz'"),
        ({"tag": "vit_tiny_patch16_224.nope", "pretrained": True}, "param", "nope"),
        ({"tag": "local-dir:/nowhere/at/all"}, "tag", "cannot get"),
        ({"param": {"embed_dims": 8}}, "param.embed_dims", "did you mean 'embed_dim'"),
        ({"tag": "resnet10t", "param": {"dropp": 1}}, "param.dropp", "no option 'dropp'"),
        ({"param": {**TINY, "num_heads": 5}}, "param", "divisible"),
        ({"param": {**TINY, "img_size": 32}}, "param.img_size", "image_size"),
        ({"param": {"num_classes": 5}}, "param.num_classes", "no classifier"),
        ({"embedding_dim": 512}, "embedding_dim", "32 numbers, not 512"),
        ({"tag": "resnet10t", "param": {}, "pool": "cls"}, "pool", "no class token"),
        ({"tag": "resnet10t", "param": {}, "patch_drop": 0.5}, "patch_drop", "cannot drop"),
        ({"patch_drop": 0.5, "trainable": False}, "patch_drop", "trainable is false"),
    ],
)
def test_mistakes_are_named_with_their_key(options, key, words):
    with pytest.raises(UserError, match=words) as caught:
        encoder(**options)
    assert caught.value.key == f"model.image_encoder.{key}"
