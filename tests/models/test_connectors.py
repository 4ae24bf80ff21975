"""Connectors: what each is made of, and clear words for those that cannot be."""

import pytest
import torch
from torch import nn

from engine.errors import UserError
from engine.models.connectors import build


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("linear", [nn.Linear]),
        ("linear_no_bias", [nn.Linear]),
        ("linear_norm", [nn.Linear, nn.LayerNorm]),
        ("mlp1x_gelu", [nn.Linear]),
        ("mlp2x_gelu", [nn.Linear, nn.GELU, nn.Linear]),
        ("mlp3x_gelu", [nn.Linear, nn.GELU, nn.Linear, nn.GELU, nn.Linear]),
    ],
)
def test_layers(name: str, kinds: list[type]) -> None:
    connector = build(name, 6, 10)
    layers = list(connector) if isinstance(connector, nn.Sequential) else [connector]
    assert [type(layer) for layer in layers] == kinds
    assert connector(torch.zeros(2, 5, 6)).shape == (2, 5, 10)
    assert (layers[0].bias is None) == (name == "linear_no_bias")


def test_identity() -> None:
    tokens = torch.randn(2, 5, 6)
    assert build("identity", 6, 6)(tokens) is tokens
    with pytest.raises(UserError, match=r"6 wide .* takes 10; take linear"):
        build("identity", 6, 10)


@pytest.mark.parametrize("name", ["lineer", "mlp0x_gelu", "mlpx_gelu", ""])
def test_unknown(name: str) -> None:
    with pytest.raises(UserError, match="no connector is called") as error:
        build(name, 6, 10)
    assert error.value.key == "model.connector.name"
