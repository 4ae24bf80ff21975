"""Adapters: what trains, what stays, merged weights, and files of adapters alone."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from engine.config.schema import Lora
from engine.errors import UserError
from engine.models.parameters import add_lora, is_adapter, merge, parameter_table, save_adapters


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 6))
        self.decoder = nn.ModuleDict({"q_proj": nn.Linear(6, 6), "out": nn.Linear(6, 3)})

    def forward(self, x_BD: torch.Tensor) -> torch.Tensor:
        return self.decoder["out"](self.decoder["q_proj"](self.encoder(x_BD)))


def make(lora: Lora | None = None, patterns: tuple[str, ...] = ("q_proj", r"encoder\.0")) -> Net:
    torch.manual_seed(0)
    net = Net().double()
    if lora is not None:
        add_lora(net, patterns, [], lora)
        with torch.no_grad():  # B starts at zero, where an adapter does nothing
            for name, parameter in net.named_parameters():
                if "lora_B" in name:
                    parameter.normal_()
    return net


X = torch.randn(4, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize(("stable", "scale"), [(False, 8 / 2), (True, 8 / 2**0.5)])
def test_an_adapter_adds_its_scaled_product(stable: bool, scale: float) -> None:
    lora = Lora(rank=2, alpha=8, rank_stabilised=stable)
    net, plain = make(lora, ("q_proj",)), make()
    layer = net.decoder["q_proj"]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    hidden = plain.encoder(X)
    want = plain.decoder["out"](plain.decoder["q_proj"](hidden) + scale * F.linear(hidden, b @ a))
    torch.testing.assert_close(net(X), want)


def test_only_adapters_train_of_an_adapted_layer_and_the_rest_as_before() -> None:
    net = make()
    net.encoder[2].requires_grad_(False)
    add_lora(net, ["q_proj"], [], Lora(rank=2))
    trained = {name for name, p in net.named_parameters() if p.requires_grad}
    assert {name for name in trained if "q_proj" in name} == {
        "decoder.q_proj.lora_A.default.weight", "decoder.q_proj.lora_B.default.weight",
    }  # fmt: skip
    assert "encoder.0.weight" in trained and "encoder.2.weight" not in trained
    states = {(row.part, row.state) for row in parameter_table(net)}
    assert ("decoder", "lora") in states and ("encoder", "frozen") in states


def test_merged_weights_say_the_same_under_the_old_names() -> None:
    net = make(Lora(rank=2, alpha=4))
    before = net(X)
    merge(net)
    torch.testing.assert_close(net(X), before, rtol=1e-5, atol=1e-5)
    assert net.state_dict().keys() == make().state_dict().keys()


def test_adapters_are_saved_alone_and_put_onto_their_base(tmp_path) -> None:
    lora = Lora(rank=2, alpha=4)
    net = make(lora)
    save_adapters(net, tmp_path, lora)
    again = make(lora)
    found = again.load_state_dict(load_file(tmp_path / "adapter_model.safetensors"), strict=False)
    assert not found.unexpected_keys
    torch.testing.assert_close(again(X), net(X))
    kept = {name for name, p in net.named_parameters() if p.requires_grad}
    assert any(is_adapter(name) for name in kept)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert settings["lora"]["rank"] == 2 and settings["layers"]


def test_an_earlier_group_takes_its_layers_away() -> None:
    net = make()
    add_lora(net, ["."], ["^encoder"], Lora(rank=2))
    adapted = {name for name, _ in net.named_parameters() if is_adapter(name)}
    assert adapted and all(name.startswith("decoder") for name in adapted)


def test_mistakes() -> None:
    with pytest.raises(
        UserError, match=r"finds no layer by 'q_prj'.*the model has encoder.0.weight, "
    ):
        add_lora(make(), ["q_prj"], [], Lora())
