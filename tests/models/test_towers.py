"""Taking a tower's weights from another run."""

import pytest
import torch

from engine.config import schema
from engine.errors import UserError
from engine.models.image import timm as timm_encoder
from engine.models.towers import load_tower

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
    with pytest.raises(UserError, match=r"is \(1, 1, 16\) there, \(1, 1, 32\) here.*and \d+ more"):
        load_tower(encoder(embed_dim=32), saved(encoder()), "image_encoder", key=KEY)
    with pytest.raises(UserError, match="missing there") as caught:
        load_tower(encoder(depth=2), saved(encoder()), "image_encoder", key=KEY)
    assert caught.value.key == KEY
    with pytest.raises(UserError, match="unknown here"):
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
