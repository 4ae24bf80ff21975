"""From the image encoder's width to the decoder's: the layer that a decoder is hung on."""

from __future__ import annotations

import re
from itertools import pairwise

from torch import nn

from engine.errors import UserError
from engine.registry import nearest

_KEY = "model.connector.name"
_MLP = re.compile(r"mlp(\d+)x_gelu")  # LLaVA's name for it
_NAMES = ["identity", "linear", "linear_no_bias", "linear_norm", "mlp2x_gelu"]


def build(name: str, width: int, target: int) -> nn.Module:
    """Tokens [B, N, width] → [B, N, target].

    ``linear_norm`` is GIT's linear layer with a layer norm, ``mlpNx_gelu`` LLaVA's N linear layers
    with GELU between them. Raises UserError for another name, and for ``identity`` between
    different widths.
    """
    if name == "identity":
        if width != target:
            raise UserError(
                f"identity cannot connect an image encoder {width} wide to a decoder that takes "
                f"{target}; take linear",
                key=_KEY,
            )
        return nn.Identity()
    if name == "linear":
        return nn.Linear(width, target)
    if name == "linear_no_bias":
        return nn.Linear(width, target, bias=False)
    if name == "linear_norm":
        return nn.Sequential(nn.Linear(width, target), nn.LayerNorm(target))
    if (found := _MLP.fullmatch(name)) and (depth := int(found[1])):
        layers: list[nn.Module] = []
        for one, other in pairwise([width, *[target] * depth]):
            layers += [nn.Linear(one, other), nn.GELU()]
        return nn.Sequential(*layers[:-1])
    raise UserError(f"no connector is called {name!r}; {nearest(name, _NAMES)}", key=_KEY)
