"""Connectors: what each is made of, and clear words for those that cannot be."""

import math

import pytest
import torch
from torch import nn

from engine.errors import UserError
from engine.models.vision_language import Positions, build_connector


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
    connector = build_connector(name, 6, 10)
    layers = list(connector) if isinstance(connector, nn.Sequential) else [connector]
    assert [type(layer) for layer in layers] == kinds
    assert connector(torch.zeros(2, 5, 6)).shape == (2, 5, 10)
    assert (layers[0].bias is None) == (name == "linear_no_bias")


def test_identity() -> None:
    tokens = torch.randn(2, 5, 6)
    assert build_connector("identity", 6, 6)(tokens) is tokens
    with pytest.raises(UserError, match=r"6 wide .* takes 10; take linear"):
        build_connector("identity", 6, 10)


@pytest.mark.parametrize("name", ["lineer", "mlp0x_gelu", "mlpx_gelu", ""])
def test_unknown(name: str) -> None:
    with pytest.raises(UserError, match="no connector is called") as error:
        build_connector(name, 6, 10)
    assert error.value.key == "model.connector.name"


@pytest.mark.parametrize(("height", "width", "prefix"), [(4, 4, 0), (2, 6, 1), (3, 1, 2)])
def test_positions_tell_row_and_column_and_nothing_else(height, width, prefix) -> None:
    connector = build_connector("linear_norm", 6, 18, Positions(height / width, prefix))
    tokens = torch.randn(2, prefix + height * width, 6, generator=torch.manual_seed(0))
    added = connector(tokens) - connector[:-1](tokens)
    torch.testing.assert_close(added[0], added[1])
    assert not added[:, :prefix].any() and not added[..., 16:].any()
    rows, columns = added[0, prefix:].view(height, width, 18).split([8, 10], dim=2)
    torch.testing.assert_close(rows, rows[:, :1].expand_as(rows))
    torch.testing.assert_close(columns, columns[:1].expand_as(columns))
    for lines in (rows[:, 0], columns[0]):  # by hand: sines, then cosines, of wavelengths 2π … 20π
        for place, found in enumerate(lines.tolist()):
            waves = [10 ** (-step / 4) for step in range(4)]
            sines = [f(place * wave) for f in (math.sin, math.cos) for wave in waves]
            assert found[:8] == pytest.approx(sines, abs=1e-6)
    assert set(connector.state_dict()) == set(connector[:-1].state_dict())


def test_tokens_that_are_no_grid() -> None:
    with pytest.raises(ValueError, match="7 tokens are not a grid of 3 rows"):
        Positions(1.0, 0)(torch.zeros(1, 7, 8))
