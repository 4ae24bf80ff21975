"""The dual encoder against the arithmetic that it stands for, written out slowly."""

import copy

import pytest
import torch
from torch import nn

from engine.models.dual_encoder import DualEncoder, partner_offsets
from engine.types import Mix

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Flat(nn.Module):
    """An image encoder: one linear layer over the pixels."""

    width = 12

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3 * 4 * 4, self.width)

    def forward(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.layer(image_BCHW.flatten(1)))


class Bag(nn.Module):
    """A text encoder: the mean of the tokens' embeddings."""

    width = 10

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, self.width)

    def forward(self, ids_BT: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
        weight_BT1 = mask_BT.unsqueeze(-1).to(self.table.weight.dtype)
        return (self.table(ids_BT) * weight_BT1).sum(1) / weight_BT1.sum(1)


def build(scalars=None, bounds=None, dim=6) -> DualEncoder:
    torch.manual_seed(0)
    scalars = {"logit_scale": (2.5, True)} if scalars is None else scalars
    return DualEncoder(Flat(), Bag(), dim, scalars, bounds or {}, MEAN, STD)


def batch(rows: int = 5, seed: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "image_BCHW": torch.randint(256, (rows, 3, 4, 4), generator=generator, dtype=torch.uint8),
        "input_ids_BT": torch.randint(50, (rows, 7), generator=generator),
        "attention_mask_BT": torch.ones(rows, 7, dtype=torch.int64),
    }


def slow_image(model, image_BCHW):
    """ToTensor, Normalize, tower, projection."""
    mean, std = (torch.tensor(x, dtype=torch.float64).view(1, 3, 1, 1) for x in (MEAN, STD))
    x = (image_BCHW.double() / 255 - mean) / std
    return x, lambda x: model.image_encoder(x) @ model.image_projection.weight.T


def unit(rows):
    return rows / rows.pow(2).sum(1, keepdim=True).sqrt()


def test_features_equal_the_slow_form_in_fp64():
    model, data = build().double(), batch()
    x, encode = slow_image(model, data["image_BCHW"])
    text = model.text_encoder(data["input_ids_BT"], data["attention_mask_BT"])
    outputs = model(data)
    assert outputs["image_BD"].dtype == torch.float64
    # the normalising constants are fp32 numbers
    assert torch.allclose(outputs["image_BD"], unit(encode(x)), atol=1e-6)
    expected = unit(text @ model.text_projection.weight.T)
    assert torch.allclose(outputs["text_BD"], expected, atol=1e-12)
    assert set(outputs) == {"image_BD", "text_BD", "logit_scale"}


def test_one_side_alone_gives_what_both_give():
    model, data = build(), batch()
    both = model(data)
    image = model({"image_BCHW": data["image_BCHW"]})
    text = model({key: data[key] for key in ("input_ids_BT", "attention_mask_BT")})
    assert set(image) == {"image_BD", "logit_scale"}
    assert set(text) == {"text_BD", "logit_scale"}
    assert torch.equal(image["image_BD"], both["image_BD"])
    assert torch.equal(text["text_BD"], both["text_BD"])


def test_float_images_are_taken_as_normalised():
    model, data = build(), batch()
    plain = model(data)["image_BD"]
    data["image_BCHW"] = model.normalise(data["image_BCHW"])
    assert torch.equal(model(data)["image_BD"], plain)


def test_uint8_input_is_left_alone():
    data = batch()
    before = data["image_BCHW"].clone()
    build()(data)
    assert torch.equal(data["image_BCHW"], before)


@pytest.mark.parametrize("rows", [1, 2, 5, 6])
@pytest.mark.parametrize("partner", ["reversed", "random"])
def test_mixing_blends_pixels_and_text_before_the_norm(rows, partner):
    model, data = build().double(), batch(rows)
    mix = Mix(lam=0.3, image=True, text=True, partner=partner, seed=11)
    outputs = model(data, mix)
    offset = outputs["partner_offset_B"]
    assert offset.dtype == torch.int64
    order = (torch.arange(rows) + offset).tolist()
    assert sorted(order) == list(range(rows))
    if partner == "reversed":
        assert order == list(reversed(range(rows)))
    x, encode = slow_image(model, data["image_BCHW"])
    mixed = torch.stack([0.3 * x[i] + 0.7 * x[j] for i, j in enumerate(order)])
    assert torch.allclose(outputs["image_BD"], unit(encode(mixed)), atol=1e-6)
    text = model.text_encoder(data["input_ids_BT"], data["attention_mask_BT"])
    text = text @ model.text_projection.weight.T
    mixed = torch.stack([0.3 * text[i] + 0.7 * text[j] for i, j in enumerate(order)])
    assert torch.allclose(outputs["text_BD"], unit(mixed), atol=1e-12)


def test_each_modality_is_mixed_only_where_asked():
    model, data = build(), batch()
    plain = model(data)
    heads = model(data, Mix(lam=0.4, image=True, text=False))
    tails = model(data, Mix(lam=0.4, image=False, text=True))
    assert torch.equal(heads["text_BD"], plain["text_BD"])
    assert not torch.equal(heads["image_BD"], plain["image_BD"])
    assert torch.equal(tails["image_BD"], plain["image_BD"])
    assert not torch.equal(tails["text_BD"], plain["text_BD"])


def test_random_partners_come_from_the_seed_alone_and_disturb_nothing():
    mix = Mix(lam=0.5, image=True, text=False, partner="random", seed=3)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = partner_offsets(mix, 64)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert torch.equal(partner_offsets(mix, 64), first)
    other = Mix(lam=0.5, image=True, text=False, partner="random", seed=4)
    assert not torch.equal(partner_offsets(other, 64), first)


def test_gradients_reach_every_parameter_and_agree_with_finite_differences():
    model, data = build(dim=2).double(), batch(3)
    data["input_ids_BT"] %= 4
    model.text_encoder.table = nn.Embedding(4, 10, dtype=torch.float64)
    mix = Mix(lam=0.7, image=True, text=True)
    names, values = zip(*model.named_parameters(), strict=True)

    def forward(*values):
        outputs = torch.func.functional_call(
            model, dict(zip(names, values, strict=True)), (data, mix)
        )
        scale = outputs["logit_scale"].exp()
        return (scale * outputs["image_BD"] @ outputs["text_BD"].T).cos().sum()

    assert torch.autograd.gradcheck(forward, tuple(v.detach().requires_grad_() for v in values))


def test_scalars_are_one_long_learned_or_kept():
    model = build({"logit_scale": (3.0, True), "logit_bias": (-10.0, False)})
    outputs = model(batch())
    assert outputs["logit_scale"].shape == outputs["logit_bias"].shape == (1,)
    assert isinstance(model.logit_scale, nn.Parameter)
    assert "logit_bias" not in dict(model.named_parameters())
    assert set(model.state_dict()) >= {"logit_scale", "logit_bias"}
    assert outputs["logit_bias"].item() == -10.0


def test_constrain_keeps_to_the_bounds():
    model = build(
        {"logit_scale": (9.0, True), "logit_bias": (-20.0, True)},
        {"logit_scale": (None, 4.0), "logit_bias": (-12.0, None)},
    )
    parameter = model.logit_scale
    model.constrain()
    assert model.logit_scale is parameter
    assert (model.logit_scale.item(), model.logit_bias.item()) == (4.0, -12.0)
    model.constrain()
    assert (model.logit_scale.item(), model.logit_bias.item()) == (4.0, -12.0)


def test_pixel_statistics_are_not_saved_and_projections_have_no_bias():
    names = set(build().state_dict())
    assert not any(name.startswith(("mean", "std")) for name in names)
    assert {name for name in names if "projection" in name} == {
        "image_projection.weight",
        "text_projection.weight",
    }


def test_projection_starts_at_the_width_to_the_minus_half():
    model = build(dim=4000)
    assert model.image_projection.weight.std().item() == pytest.approx(12**-0.5, rel=0.02)
    assert model.text_projection.weight.std().item() == pytest.approx(10**-0.5, rel=0.02)


def test_norm_is_taken_in_fp32_under_autocast():
    model, data = build(), batch()
    with torch.no_grad():
        model.image_projection.weight.mul_(1e-4)  # squares that half precision loses
    exact = copy.deepcopy(model).double()(data)["image_BD"].float()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(data)
    assert outputs["image_BD"].dtype == outputs["text_BD"].dtype == torch.float32
    assert torch.allclose(outputs["image_BD"].norm(dim=1), torch.ones(5), atol=1e-6)
    assert torch.nn.functional.cosine_similarity(outputs["image_BD"], exact).min() > 0.999
