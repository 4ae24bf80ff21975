"""What of an image encoder takes no part in the tokens that a decoder is given."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from engine.errors import UserError

KEY = "model.connector.layer"


def freeze_idle(encoder: nn.Module, layer: int, size: tuple[int, int]) -> None:
    """Freeze what ``encoder.tokens(image, layer)`` does not run through: layers behind it.

    Left trainable they would get no gradient, for which all ranks would wait. Tries one image of
    ``size``. Raises UserError where the encoder has no such layer, or takes no such image.
    """
    tower: Any = encoder
    trained = {name: p for name, p in encoder.named_parameters() if p.requires_grad}
    modes = [(module, module.training) for module in encoder.modules()]
    encoder.eval()  # running statistics stay as they are
    try:
        with torch.set_grad_enabled(bool(trained)):
            tokens_BND = tower.tokens(torch.zeros(1, 3, *size), layer)
        if trained:
            found = torch.autograd.grad(tokens_BND.sum(), list(trained.values()), allow_unused=True)
            for parameter, gradient in zip(trained.values(), found, strict=True):
                parameter.requires_grad_(gradient is not None)
    except (IndexError, AssertionError, ValueError, AttributeError) as error:
        raise UserError(
            f"the image encoder gives no hidden layer {layer}: "
            f"{(str(error).splitlines() or [type(error).__name__])[0]}",
            key=KEY,
        ) from error
    finally:
        for module, training in modes:
            module.training = training
