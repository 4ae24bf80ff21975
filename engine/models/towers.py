"""Start a tower from the weights of another run, whose images may have had another size."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

import engine.torchvision_ops  # noqa: F401  before timm, which imports torchvision

from timm.layers import resample_abs_pos_embed  # isort: skip
from engine.errors import UserError


def load_tower(module: nn.Module, tensors: dict[str, Tensor], part: str, *, key: str) -> None:
    """Copy ``part`` (``image_encoder``, ``text_encoder``) of a run's weights into ``module``.

    Learned image positions are resampled (bicubic) where the number of patches differs. Raises
    UserError at ``key`` for a run without such a part, and for weights that do not fit.
    """
    given = {
        name.removeprefix(f"{part}."): tensor
        for name, tensor in tensors.items()
        if name.startswith(f"{part}.")
    }
    if not given:
        parts = sorted({name.split(".")[0] for name in tensors})
        raise UserError(f"the run has no {part}; it has {', '.join(parts) or 'nothing'}", key=key)
    own = module.state_dict()
    _resample_positions(module, given, own)
    wrong = [
        f"{name} is {tuple(given[name].shape)} there, {tuple(own[name].shape)} here"
        for name in own
        if name in given and given[name].shape != own[name].shape
    ]
    wrong += [f"{name} is missing there" for name in own if name not in given]
    wrong += [f"{name} is unknown here" for name in given if name not in own]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(
            f"the run's {part} does not fit: {'; '.join(wrong[:3])}{more}; give the tower the "
            "sizes that the run has",
            key=key,
        )
    module.load_state_dict(given)


def _resample_positions(
    module: nn.Module, given: dict[str, Tensor], own: dict[str, Tensor]
) -> None:
    """Fit the positions of a square grid of patches to another square grid, in place."""
    model = getattr(module, "model", module)
    prefix = int(getattr(model, "num_prefix_tokens", 0))
    if getattr(model, "no_embed_class", False):
        prefix = 0
    for name, tensor in own.items():
        old = given.get(name)
        if not name.endswith("pos_embed") or old is None or old.ndim != 3 or tensor.ndim != 3:
            continue
        old_side, side = (math.isqrt(max(0, x.shape[1] - prefix)) for x in (old, tensor))
        square = all(s * s + prefix == x.shape[1] for s, x in ((old_side, old), (side, tensor)))
        if old.shape[1] != tensor.shape[1] and old.shape[2] == tensor.shape[2] and square:
            with torch.no_grad():
                given[name] = resample_abs_pos_embed(
                    old, [side, side], [old_side, old_side], num_prefix_tokens=prefix
                )
