"""From the image encoder's width to the decoder's: the layer between them."""

from __future__ import annotations

import math
import re
from itertools import pairwise

import torch
from torch import Tensor, nn

from engine.errors import UserError
from engine.registry import nearest

_KEY = "model.connector.name"
_MLP = re.compile(r"mlp(\d+)x_gelu")  # LLaVA's name for it


class Positions(nn.Module):
    """Adds its place in the image to each token: sines and cosines of its row and its column.

    They tell a decoder that has no positions of its own for images (T5) above from below, beside
    tokens whose channels vary by about 1 (``linear_norm``). Their wavelengths are between 2π and
    20π tokens, for grids of up to about 30 tokens a side.

    Args:
        aspect: height of the image by its width, from which the grid of its tokens follows.
        num_prefix_tokens: tokens before the grid, which have no place.
    """

    def __init__(self, aspect: float, num_prefix_tokens: int) -> None:
        super().__init__()
        self.aspect, self.num_prefix_tokens = aspect, num_prefix_tokens

    def forward(self, tokens_BND: Tensor) -> Tensor:
        """Tokens [B, N, D] → the same with positions. ValueError where they are not such a grid."""
        number, width = tokens_BND.shape[1] - self.num_prefix_tokens, tokens_BND.shape[2]
        rows = max(1, round(math.sqrt(number * self.aspect)))
        if number % rows:
            raise ValueError(f"{number} tokens are not a grid of {rows} rows")
        places = torch.arange(number, device=tokens_BND.device)
        steps = torch.arange(width // 4, device=tokens_BND.device)
        waves_W = 10.0 ** (-steps / (width // 4))
        parts = []
        for place_N in (places // (number // rows), places % (number // rows)):
            angle_NW = place_N[:, None] * waves_W
            parts += [angle_NW.sin(), angle_NW.cos()]
        place_ND = torch.cat(parts, 1).to(tokens_BND.dtype)
        space = 0, width - place_ND.shape[1], self.num_prefix_tokens, 0  # widths of 4n + 1, 2, 3
        return tokens_BND + nn.functional.pad(place_ND, space)


def build(name: str, width: int, target: int, positions: Positions | None = None) -> nn.Module:
    """Tokens [B, N, width] → [B, N, target], with ``positions`` added to what comes out.

    ``linear_norm`` is GIT's linear layer with a layer norm, ``mlpNx_gelu`` LLaVA's N linear layers
    with GELU between them. Raises UserError for another name, and for ``identity`` between
    different widths.
    """
    layers: list[nn.Module] = []
    if name == "identity":
        if width != target:
            raise UserError(f"identity cannot connect an image encoder {width} wide to a decoder "
                            f"that takes {target}; take linear", key=_KEY)  # fmt: skip
        layers = [nn.Identity()]
    elif name in ("linear", "linear_no_bias", "linear_norm"):
        layers = [nn.Linear(width, target, bias=name != "linear_no_bias")]
        if name == "linear_norm":
            layers.append(nn.LayerNorm(target))
    elif (found := _MLP.fullmatch(name)) and (depth := int(found[1])):
        for one, other in pairwise([width, *[target] * depth]):
            layers += [nn.Linear(one, other), nn.GELU()]
        layers.pop()
    else:
        known = ["identity", "linear", "linear_no_bias", "linear_norm", "mlp2x_gelu"]
        raise UserError(f"no connector is called {name!r}; {nearest(name, known)}", key=_KEY)
    if positions is not None:
        layers.append(positions)
    # parameters' names: one linear layer stands alone, all others in a sequence
    alone = len(layers) == 1 and not name.startswith("mlp")
    return layers[0] if alone else nn.Sequential(*layers)
