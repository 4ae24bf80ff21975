"""Weights from a file into a model: which files are not opened, and what must fit."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from engine.errors import UserError

_PICKLED_SUFFIXES = {".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle", ".distcp"}
_ZIP, _PICKLE = b"PK\x03\x04", re.compile(rb"\x80[\x02-\x05]")
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


def what_is_there(path: Path) -> str:
    """What the nearest folder above holds, for a message."""
    folder = next(parent for parent in path.absolute().parents if parent.is_dir())
    names = sorted(entry.name for entry in folder.iterdir())
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return f"in {folder} there is: {', '.join(names[:10]) or 'nothing'}{more}"


def refuse_pickle(path: Path, key: str | None) -> None:
    """Raises UserError for a pickled file, by its name or content, and for none of safetensors."""
    with path.open("rb") as file:
        head = file.read(9)
    # A safetensors file starts with its header's length, whose bytes may look like a pickle's
    is_safetensors = head[8:9] == b"{"
    magic = head.startswith(_ZIP) or _PICKLE.match(head) is not None
    if path.suffix.lower() in _PICKLED_SUFFIXES or (magic and not is_safetensors):
        raise UserError(refusal(path), key=key)
    if not is_safetensors:
        raise UserError(f"{path} is not a safetensors file", key=key)


def refusal(path: Path) -> str:
    """Why a pickled file is not opened, and how to convert it."""
    convert = (
        "import sys, torch, safetensors.torch as s; "
        "w = torch.load(sys.argv[1], map_location='cpu', weights_only=True); "
        "w = w.get('state_dict', w); "
        "s.save_file({k: v.clone() for k, v in w.items()}, sys.argv[2])"
    )
    return (
        f"{path} is a pickled file, which is refused because reading one can run code that is "
        "hidden in it. If it holds a model's weights and you trust where it comes from, convert "
        f'it once: python -c "{convert}" {path.name} {path.stem}.safetensors'
    )


def load_model(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    *,
    key: str | None = None,
    prefix: str | None = None,
) -> None:
    """Copies ``tensors`` into ``module``: every name and shape must match, or nothing is copied.

    ``prefix`` (``"image_encoder."``) takes only the tensors below it, for a part of a model.
    Raises UserError that names the parameters that do not fit and the keys that usually cause it.
    """
    if prefix is not None:
        below = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        if not below:
            parts = ", ".join(sorted({name.split(".")[0] for name in tensors}))
            raise UserError(f"the checkpoint has nothing under {prefix!r}; it has {parts}", key=key)
        tensors = below
    own = module.state_dict()
    pairs = _pairs(own, tensors)
    faults, names = _faults(own, tensors, pairs)
    if faults:
        hints = dict.fromkeys(hint for name in names if (hint := _hint((prefix or "") + name)))
        remedy = f". Usually caused by other values of: {'; '.join(hints)}" if hints else ""
        raise UserError(
            f"the checkpoint does not fit the model: {'; '.join(faults)}{remedy}", key=key
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
