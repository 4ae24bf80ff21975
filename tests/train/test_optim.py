"""Classes, groups, layer decay, and errors in optim.* that are reported before a step is made."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import engine.torchvision_ops  # noqa: F401  # before timm and transformers
from engine.config.schema import Lr, Optim, ParamGroup
from engine.dist import ddp
from engine.errors import UserError
from engine.train import optim


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.linear = nn.Linear(4, 4)


class Image(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 4))
        self.patch_embed = nn.Linear(4, 4)
        self.blocks = nn.ModuleList([Block(), Block(), Block()])
        self.norm = nn.LayerNorm(4)


class Text(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(7, 4)
        self.encoder = nn.Module()
        self.encoder.layer = nn.ModuleList([Block(), Block()])
        self.pooler = nn.Linear(4, 4)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image_encoder = Image()
        self.text_encoder = Text()
        self.image_projection = nn.Linear(4, 2, bias=False)
        self.logit_scale = nn.Parameter(torch.ones(1))


def _settings(config: Optim) -> dict[str, dict[str, Any]]:
    """Group settings by the parameter's name."""
    model = Model()
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        names[parameter]: {key: value for key, value in group.items() if key != "params"}
        for group in optim.build(model, config).param_groups
        for parameter in group["params"]
    }


def test_each_class_of_torch_and_lars_makes_a_step() -> None:
    names = [n for n, kind in vars(torch.optim).items() if isinstance(kind, type)]
    usable = [n for n in names if n not in ("Optimizer", "LBFGS", "SparseAdam", "Muon")]
    assert len(usable) >= 12
    for name in [*usable, "LARS", *(f"torch.optim.{n}" for n in usable)]:
        model = Model()
        optimizer = optim.build(model, Optim(name=name))
        before = model.text_encoder.pooler.weight.detach().clone()
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        assert type(optimizer).__name__ == name.rpartition(".")[2]
        assert not torch.equal(before, model.text_encoder.pooler.weight)


def test_param_reaches_the_class() -> None:
    param = {"betas": [0.9, 0.98], "eps": 1e-6, "weight_decay": 0.001}
    optimizer = optim.build(Model(), Optim(param=param, lr=Lr(init=3e-4)))
    assert type(optimizer) is torch.optim.AdamW
    group = optimizer.param_groups[0]
    assert (group["betas"], group["eps"], group["lr"]) == ((0.9, 0.98), 1e-6, 3e-4)
    assert group["fused"]
    assert optim.build(Model(), Optim(param={"foreach": True})).param_groups[0]["fused"] is None


def test_norms_biases_and_scalars_do_not_decay() -> None:
    found = _settings(Optim(param={"weight_decay": 0.3}))
    for name, group in found.items():
        still = "norm" in name or name.endswith("bias") or name == "logit_scale"
        assert group["weight_decay"] == (0.0 if still else 0.3), name
        assert group["lr_scale"] == 1.0
    assert len(found) == len(list(Model().parameters()))
    assert _settings(Optim())["image_projection.weight"]["weight_decay"] == 0.01  # AdamW's own


def test_the_first_pattern_that_matches_rules() -> None:
    groups = [
        ParamGroup(pattern=r"^image_encoder\.blocks\.0", freeze=True),
        ParamGroup(pattern=r"^image_encoder", lr_scale=0.1, weight_decay=0.0),
        ParamGroup(pattern="logit_scale|encoder", lr_scale=5.0),
    ]
    found = _settings(Optim(groups=groups, param={"weight_decay": 0.3}, lr=Lr(init=0.01)))
    assert not [name for name in found if name.startswith("image_encoder.blocks.0")]
    assert found["image_encoder.blocks.1.linear.weight"]["lr_scale"] == 0.1
    assert found["image_encoder.blocks.1.linear.weight"]["weight_decay"] == 0.0
    assert found["text_encoder.pooler.weight"]["lr_scale"] == 5.0
    assert found["text_encoder.pooler.weight"]["weight_decay"] == 0.3
    assert found["text_encoder.pooler.weight"]["lr"] == pytest.approx(0.05)
    assert found["logit_scale"]["weight_decay"] == 0.0
    assert found["image_projection.weight"]["lr_scale"] == 1.0


def test_freeze_takes_parameters_out_of_training() -> None:
    model = Model()
    optim.freeze(model, Optim(groups=[ParamGroup(pattern="^image_encoder", freeze=True)]))
    assert not any(p.requires_grad for p in model.image_encoder.parameters())
    assert all(p.requires_grad for p in model.text_encoder.parameters())


def test_layer_decay_counts_down_from_each_towers_head() -> None:
    found = {name: group["lr_scale"] for name, group in _settings(Optim(layer_decay=0.5)).items()}
    assert found["image_encoder.norm.weight"] == 1.0
    assert found["image_encoder.blocks.2.linear.weight"] == 0.5
    assert found["image_encoder.blocks.0.norm.bias"] == 0.125
    assert found["image_encoder.patch_embed.weight"] == 0.0625
    assert found["image_encoder.cls_token"] == 0.0625
    assert found["text_encoder.pooler.bias"] == 1.0
    assert found["text_encoder.encoder.layer.1.linear.weight"] == 0.5
    assert found["text_encoder.encoder.layer.0.norm.weight"] == 0.25
    assert found["text_encoder.embeddings.weight"] == 0.125
    assert found["image_projection.weight"] == found["logit_scale"] == 1.0


def test_layers_of_real_towers() -> None:
    import timm
    from transformers import BertConfig, BertModel

    def depths(tower: str, model: nn.Module) -> dict[str, float]:
        return optim.layer_depths([f"{tower}.model.{n}" for n, _ in model.named_parameters()])

    vit = depths("image_encoder", timm.create_model("test_vit", num_classes=0))
    layers = max(int(n.split("blocks.")[1].split(".")[0]) for n in vit if "blocks." in n) + 1
    assert vit["image_encoder.model.patch_embed.proj.weight"] == layers + 1
    assert vit["image_encoder.model.pos_embed"] == layers + 1
    assert vit["image_encoder.model.blocks.0.attn.qkv.weight"] == layers
    assert vit["image_encoder.model.norm.weight"] == 0

    resnet = depths("image_encoder", timm.create_model("resnet18", num_classes=0))
    assert resnet["image_encoder.model.conv1.weight"] == max(resnet.values())
    assert resnet["image_encoder.model.layer1.0.conv1.weight"] == max(resnet.values()) - 1

    sizes = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 9}
    bert = depths("text_encoder", BertModel(BertConfig(num_hidden_layers=3, **sizes)))
    assert bert["text_encoder.model.embeddings.word_embeddings.weight"] == 4
    assert bert["text_encoder.model.embeddings.LayerNorm.weight"] == 4
    assert bert["text_encoder.model.encoder.layer.0.output.dense.weight"] == 3
    assert bert["text_encoder.model.pooler.dense.weight"] == 0


def test_clipping_equals_torchs() -> None:
    for max_norm in (0.5, 100.0, None):
        models = [Model(), Model()]
        for model in models:
            for number, parameter in enumerate(model.parameters()):
                parameter.grad = torch.full_like(parameter, number / 10) if number % 3 else None
        want = nn.utils.clip_grad_norm_(models[0].parameters(), max_norm or float("inf"))
        norm = ddp.clip_gradients(models[1].parameters(), max_norm)
        assert norm == pytest.approx(float(want))
        for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
            assert (a.grad is None) == (b.grad is None)
            if a.grad is not None:
                torch.testing.assert_close(a.grad, b.grad)
    assert ddp.clip_gradients([], 1.0) == 0.0


def test_clipping_reports_a_norm_that_is_not_finite() -> None:
    parameter = nn.Parameter(torch.ones(2))
    parameter.grad = torch.tensor([1.0, float("inf")])
    assert ddp.clip_gradients([parameter], 1.0) == float("inf")
    assert parameter.grad[0] == 1.0


@pytest.mark.parametrize(
    ("config", "message", "key"),
    [
        ({"name": "AdamV"}, "did you mean 'Adam", "optim.name"),
        ({"name": "lars2"}, "did you mean 'lars'", "optim.name"),
        ({"name": "adahessian"}, "second derivatives", "optim.name"),
        ({"name": "torch.optim.LBFGS"}, "several times a step", "optim.name"),
        ({"name": "SparseAdam"}, "sparse", "optim.name"),
        ({"name": "no_such_package.Lion"}, "cannot import", "optim.name"),
        ({"name": "torch.nn.Linear"}, "not a torch.optim.Optimizer", "optim.name"),
        ({"param": {"weight_decya": 1}}, "did you mean 'weight_decay'", "optim.param.weight_decya"),
        ({"param": {"lr": 1}}, "optim.lr.init", "optim.param.lr"),
        ({"param": {"betas": (0.9, 1.5)}}, r"Invalid beta", "optim.param"),
        ({"param": {"eps": "small"}}, "AdamW: ", "optim.param"),
        ({"name": "Muon"}, "Muon", "optim.param"),
        (
            {"groups": [{"pattern": "image_encode$"}]},
            "finds no parameter; the model's parts are image_encoder, ",
            "optim.groups.0.pattern",
        ),
        (
            {"groups": [{"pattern": "image"}, {"pattern": "image_encoder"}]},
            "move it up",
            "optim.groups.1.pattern",
        ),
        ({"groups": [{"pattern": "", "freeze": True}]}, "nothing is left", "optim.groups"),
    ],
)
def test_errors_are_named(config: dict[str, Any], message: str, key: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        optim.build(Model(), Optim(**config))
    assert caught.value.key == key


TIMM = ("lamb", "lambc", "larc", "lars", "lion", "adan", "adopt", "cadamw", "muon", "novograd")


@pytest.mark.parametrize("name", [*TIMM, "timm.optim.Lars", "timm.optim.Adan"])
def test_timms_by_name(name: str) -> None:
    import timm.optim

    model = Model()
    optimizer = optim.build(model, Optim(name=name, param={"weight_decay": 0.1}))
    want = timm.optim.get_optimizer_class(name.rpartition(".")[2], bind_defaults=False)
    assert type(optimizer) is want
    before = model.text_encoder.pooler.weight.detach().clone()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.step()  # ADOPT's first one only makes its state
    assert not torch.equal(before, model.text_encoder.pooler.weight)


def test_an_optimizer_that_needs_another_library_says_so() -> None:
    with pytest.raises(UserError, match=r"bnbadam cannot be used: .*bitsandbytes"):
        optim.build(Model(), Optim(name="bnbadam"))


def test_optimizer_from_outside() -> None:
    name = "tests.train.lars_by_hand.LARS"
    kind = optim.build(Model(), Optim(name=name, param={"momentum": 0.5}))
    assert type(kind).__module__ == "tests.train.lars_by_hand"
    assert kind.param_groups[0]["momentum"] == 0.5
