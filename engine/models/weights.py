"""Weights of a run or a file into a model: what must fit, and the error where it does not."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from engine.errors import UserError

_NUM_SHOWN = 4  # names in a message
_KEYS = (  # what a parameter's name says about the key that made it; the first match counts
    (r"logit_bias", "loss.name"),
    (r"logit_scale", "loss.temperature"),
    (r"(image|text)_proj|projection", "model.projection.dim"),
    (r"pos(ition)?_?emb", "transforms (image size), model.text_encoder.config"),
    (r"(word_|token_|tok_?)embed|\bwte\b", "model.text_encoder.tokenizer"),
    (r"image_encoder|visual", "model.image_encoder.tag, model.image_encoder.param"),
    (r"text_encoder|text", "model.text_encoder.tag, model.text_encoder.config"),
)


def load_model(module: nn.Module, tensors: Mapping[str, Tensor], *, key: str | None = None) -> None:
    """Copies ``tensors`` into ``module``: every name and shape must match, or nothing is copied.

    Raises UserError that names the parameters that do not fit and the keys that usually cause it.
    """
    _load(module, tensors, "", key)


def load_tower(module: nn.Module, tensors: Mapping[str, Tensor], part: str, *, key: str) -> None:
    """Copies ``part`` (``image_encoder``, ``text_encoder``) of a run's weights into ``module``.

    Learned image positions are resampled (bicubic) where the number of patches differs. Raises
    UserError at ``key`` for a run without such a part, and for weights that do not fit.
    """
    prefix = f"{part}."
    given = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    if not given:
        parts = sorted({name.split(".")[0] for name in tensors})
        raise UserError(f"the run has no {part}; it has {', '.join(parts) or 'nothing'}", key=key)
    _resample_positions(module, given)
    _load(module, given, part, key)


def _load(module: nn.Module, tensors: Mapping[str, Tensor], part: str, key: str | None) -> None:
    own = module.state_dict()
    pairs = _pairs(own, tensors)
    faults, names = _faults(own, tensors, pairs)
    if faults:
        hints = dict.fromkeys(hint for name in names if (hint := _hint(f"{part}.{name}")))
        remedy = f". Usually caused by other values of: {'; '.join(hints)}" if hints else ""
        raise UserError(
            f"the checkpoint does not fit the {part or 'model'}: {'; '.join(faults)}{remedy}",
            key=key,
        )
    with torch.no_grad():
        for name, source in pairs.items():
            own[name].copy_(source)


def _pairs(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Source of each of the model's tensors; one that is tied may come under its other name."""
    by_memory = {t.data_ptr(): tensors[n] for n, t in own.items() if n in tensors and t.numel()}
    pairs = {}
    for name, tensor in own.items():
        source = tensors.get(name, by_memory.get(tensor.data_ptr()))
        if source is not None:
            pairs[name] = source
    return pairs


def _faults(
    own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], pairs: Mapping[str, Tensor]
) -> tuple[list[str], list[str]]:
    """What does not fit, in words, and the names concerned."""
    missing = [name for name in own if name not in pairs]
    unexpected = [name for name in tensors if name not in own]
    unequal = [name for name, source in pairs.items() if source.shape != own[name].shape]
    faults = []
    if missing:
        faults.append(f"missing in the checkpoint: {_shown(missing)}")
    if unexpected:
        faults.append(f"not in the model: {_shown(unexpected)}")
    if unequal:
        shapes = [f"{n} {_shape(pairs[n])} in the checkpoint, {_shape(own[n])} in the model"
                  for n in unequal]  # fmt: skip
        faults.append(f"other shapes: {_shown(shapes)}")
    return faults, [*missing, *unexpected, *unequal]


def _shown(items: list[str]) -> str:
    more = f" and {len(items) - _NUM_SHOWN} more" if len(items) > _NUM_SHOWN else ""
    return ", ".join(items[:_NUM_SHOWN]) + more


def _shape(tensor: Tensor) -> str:
    return "×".join(map(str, tensor.shape)) or "scalar"


def _hint(name: str) -> str | None:
    return next((keys for pattern, keys in _KEYS if re.search(pattern, name)), None)


def _resample_positions(module: nn.Module, given: dict[str, Tensor]) -> None:
    """Fit the positions of a square grid of patches to another square grid, in place."""
    model = getattr(module, "model", module)
    prefix = int(getattr(model, "num_prefix_tokens", 0))
    if getattr(model, "no_embed_class", False):
        prefix = 0
    for name, tensor in module.state_dict().items():
        old = given.get(name)
        if not name.endswith("pos_embed") or old is None or old.ndim != 3 or tensor.ndim != 3:
            continue
        old_side, side = (math.isqrt(max(0, x.shape[1] - prefix)) for x in (old, tensor))
        square = all(s * s + prefix == x.shape[1] for s, x in ((old_side, old), (side, tensor)))
        if old.shape[1] != tensor.shape[1] and old.shape[2] == tensor.shape[2] and square:
            import engine.torchvision_ops  # noqa: F401  before timm, which imports torchvision

            from timm.layers import resample_abs_pos_embed  # isort: skip  a second to import

            with torch.no_grad():
                given[name] = resample_abs_pos_embed(
                    old, [side, side], [old_side, old_side], num_prefix_tokens=prefix
                )
