"""Weights of a run or a file into a model: what must fit, and the error where it does not."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from engine.errors import UserError

_NUM_SHOWN = 4  # names in a message
_KEYS = {  # what a parameter's name says about the key that made it; the first match counts
    r"logit_bias": "loss.name",
    r"logit_scale": "loss.temperature",
    r"(image|text)_proj|projection": "model.projection.dim",
    r"pos(ition)?_?emb": "transforms (image size), model.text_encoder.config",
    r"(word_|token_|tok_?)embed|\bwte\b": "model.text_encoder.tokenizer",
    r"image_encoder|visual": "model.image_encoder.tag, model.image_encoder.param",
    r"text_encoder|text": "model.text_encoder.tag, model.text_encoder.config",
}


def load_model(
    module: nn.Module, tensors: Mapping[str, Tensor], *, key: str | None = None, part: str = ""
) -> None:
    """Copies ``tensors`` into ``module``: every name and shape must match, or nothing is copied.

    One of the tensors that the model ties may come under another's name. Raises UserError that
    names the parameters that do not fit and the keys that usually cause it; ``part`` is what the
    module is of the model.
    """
    own = module.state_dict()
    by_memory = {t.data_ptr(): tensors[n] for n, t in own.items() if n in tensors and t.numel()}
    found = {n: tensors.get(n, by_memory.get(t.data_ptr())) for n, t in own.items()}
    pairs = {name: source for name, source in found.items() if source is not None}
    faults = {  # names, and how each is shown
        "missing in the checkpoint": {name: name for name in own if name not in pairs},
        "not in the model": {name: name for name in tensors if name not in own},
        "other shapes": {
            n: f"{n} {_shape(t)} in the checkpoint, {_shape(own[n])} in the model"
            for n, t in pairs.items()
            if t.shape != own[n].shape
        },
    }
    if any(faults.values()):
        texts = [f"{what}: {_some(shown.values())}" for what, shown in faults.items() if shown]
        names = [f"{part}.{name}" for shown in faults.values() for name in shown]
        remedy = "; ".join(dict.fromkeys(hint for name in names if (hint := _hint(name))))
        raise UserError(
            f"the checkpoint does not fit the {part or 'model'}: {'; '.join(texts)}"
            + (f". Usually caused by other values of: {remedy}" if remedy else ""),
            key=key,
        )
    with torch.no_grad():
        for name, source in pairs.items():
            own[name].copy_(source)


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
    load_model(module, given, key=key, part=part)


def _some(items: Iterable[str]) -> str:
    some = list(items)
    more = f" and {len(some) - _NUM_SHOWN} more" if len(some) > _NUM_SHOWN else ""
    return ", ".join(some[:_NUM_SHOWN]) + more


def _shape(tensor: Tensor) -> str:
    return "×".join(map(str, tensor.shape)) or "scalar"


def _hint(name: str) -> str | None:
    return next((keys for pattern, keys in _KEYS.items() if re.search(pattern, name)), None)


def _resample_positions(module: nn.Module, given: dict[str, Tensor]) -> None:
    """Fit the positions of a square grid of patches to another square grid, in place."""
    model = getattr(module, "model", module)
    fixed = getattr(model, "no_embed_class", False)
    prefix = 0 if fixed else int(getattr(model, "num_prefix_tokens", 0))
    for name, tensor in module.state_dict().items():
        old = given.get(name)
        if not name.endswith("pos_embed") or old is None or old.ndim != 3 or tensor.ndim != 3:
            continue
        old_side, side = (math.isqrt(max(0, x.shape[1] - prefix)) for x in (old, tensor))
        square = all(s * s + prefix == x.shape[1] for s, x in ((old_side, old), (side, tensor)))
        if old.shape[1] != tensor.shape[1] and old.shape[2] == tensor.shape[2] and square:
            from timm.layers import resample_abs_pos_embed  # a second to import

            with torch.no_grad():
                given[name] = resample_abs_pos_embed(
                    old, [side, side], [old_side, old_side], num_prefix_tokens=prefix
                )
