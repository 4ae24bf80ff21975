"""Weights of a run into a model, or one of its towers into another."""

import pytest
import torch
from torch import nn

from engine.config import schema
from engine.errors import UserError
from engine.models.image import timm as timm_encoder
from engine.models.weights import load_model, load_tower
from engine.train import serial

KEY = "model.image_encoder.init"


def encoder(size=32, **param):
    param = {"depth": 1, "embed_dim": 16, "num_heads": 2, "patch_size": 8, **param}
    config = schema.ImageEncoder(tag="vit_tiny_patch16_224", param=param)
    return timm_encoder.build(config, image_size=size)


def saved(module, part="image_encoder"):
    tensors = {f"{part}.{name}": t.clone() for name, t in module.state_dict().items()}
    return {**tensors, "logit_scale": torch.ones(1)}


def test_same_size_is_copied_exactly():
    source, target = encoder(), encoder()
    load_tower(target, saved(source), "image_encoder", key=KEY)
    state = target.state_dict()
    assert all(torch.equal(state[name], t) for name, t in source.state_dict().items())


@pytest.mark.parametrize("options", [{}, {"class_token": False, "global_pool": "avg"},
                                     {"no_embed_class": True}, {"reg_tokens": 2}])  # fmt: skip
def test_positions_are_resampled_for_other_image_sizes(options):
    source, target = encoder(32, **options), encoder(64, **options)
    prefix = source.model.pos_embed.shape[1] - 16
    ramp_HW = torch.linspace(0, 1, 4).repeat(4, 1)  # rises to the right in every channel
    with torch.no_grad():
        source.model.pos_embed[0, prefix:] = ramp_HW.reshape(16, 1).expand(16, 16)
        source.model.pos_embed[0, :prefix] = 7.0
    load_tower(target, saved(source), "image_encoder", key=KEY)
    new = target.model.pos_embed[0]
    assert (new[:prefix] == 7).all()
    grid_HW = new[prefix:, 0].view(8, 8)
    assert torch.allclose(grid_HW, grid_HW[:1].expand(8, 8), atol=1e-5)
    assert (grid_HW[0].diff() > 0).all()
    assert grid_HW.mean().item() == pytest.approx(0.5, abs=1e-5)


def test_other_shapes_are_refused_by_name():
    with pytest.raises(UserError, match=r"1×1×16 in the checkpoint, 1×1×32 in the .*and \d+ more"):
        load_tower(encoder(embed_dim=32), saved(encoder()), "image_encoder", key=KEY)
    with pytest.raises(
        UserError, match="fit the image_encoder: missing in the checkpoint"
    ) as caught:
        load_tower(encoder(depth=2), saved(encoder()), "image_encoder", key=KEY)
    assert caught.value.key == KEY
    with pytest.raises(UserError, match=r"not in the model: .*model.image_encoder.tag"):
        load_tower(encoder(), saved(encoder(depth=2)), "image_encoder", key=KEY)


def test_a_run_without_the_part_is_refused():
    with pytest.raises(UserError, match="no text_encoder; it has image_encoder, logit_scale"):
        load_tower(encoder(), saved(encoder()), "text_encoder", key="model.text_encoder.init")


def test_a_refused_tower_is_left_as_it_was():
    target = encoder(embed_dim=32)
    before = {name: t.clone() for name, t in target.state_dict().items()}
    with pytest.raises(UserError):
        load_tower(target, saved(encoder()), "image_encoder", key=KEY)
    assert all(torch.equal(before[name], t) for name, t in target.state_dict().items())


# --- whole models


def tower(width=4, **more):
    parts = {"image_encoder": nn.Linear(2, width), "projection": nn.Linear(width, 3, bias=False)}
    return nn.ModuleDict(parts | more)


def test_all_is_copied_in_place():
    source, target = tower(), tower()
    pointers = [p.data_ptr() for p in target.parameters()]
    load_model(target, source.state_dict())
    assert [p.data_ptr() for p in target.parameters()] == pointers
    for a, b in zip(source.parameters(), target.parameters(), strict=True):
        assert torch.equal(a, b) and a.data_ptr() != b.data_ptr()


def check_refused(target, tensors, *texts):
    before = [p.clone() for p in target.parameters()]
    with pytest.raises(UserError) as caught:
        load_model(target, tensors, key="model.init")
    assert caught.value.key == "model.init"
    for text in texts:
        assert text in str(caught.value)
    assert all(map(torch.equal, before, target.parameters()))


def test_shapes_that_differ_are_named_with_both_and_the_usual_cause():
    check_refused(
        tower(4), tower(5).state_dict(),
        "image_encoder.weight 5×2 in the checkpoint, 4×2 in the model",
        "model.image_encoder.tag", "model.projection.dim",
    )  # fmt: skip


def test_missing_and_unexpected_names():
    bias = nn.ParameterDict({"logit_bias": nn.Parameter(torch.zeros(1))})
    check_refused(tower(loss=bias), tower().state_dict(),
                  "missing in the checkpoint: loss.logit_bias", "loss.name")  # fmt: skip
    check_refused(tower(), tower(loss=bias).state_dict(), "not in the model: loss.logit_bias")


def test_only_the_first_few_are_named():
    many = {f"layer_{i}": torch.zeros(1) for i in range(30)}
    check_refused(tower(), tower().state_dict() | many, "layer_3 and 26 more")


def test_tied_weights_may_come_under_one_name():
    def tied():
        embedding, head = nn.Embedding(7, 3), nn.Linear(3, 7, bias=False)
        head.weight = embedding.weight
        return nn.ModuleDict({"embedding": embedding, "head": head})

    source, target = tied(), tied()
    load_model(target, {"head.weight": source["head"].weight})
    assert torch.equal(target["embedding"].weight, source["head"].weight)
    tensors, names = serial.untie(source.state_dict())
    load_model(tied(), tensors)
    assert names == {"head.weight": "embedding.weight"}
