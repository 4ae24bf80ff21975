"""The first blocks of a language model, or chosen ones: a smaller decoder with its own weights."""

from __future__ import annotations

from typing import Any

from torch import nn

from engine.config.model import Decoder as Section
from engine.errors import UserError

_KEY = "model.decoder"


def wanted(section: Section, total: int, name: str) -> list[int]:
    """Numbers of the blocks to keep of a model that has ``total``. Raises UserError."""
    if section.keep is not None and section.num_blocks is not None:
        raise UserError(
            f"num_blocks: {section.num_blocks} and keep: {section.keep} both choose blocks; leave "
            "one out",
            key=f"{_KEY}.keep",
        )
    key = f"{_KEY}.num_blocks" if section.keep is None else f"{_KEY}.keep"
    number = total if section.num_blocks is None else section.num_blocks
    keep = list(range(number)) if section.keep is None else section.keep
    if not keep:
        raise UserError(
            f"no block of decoder {name} is kept; keep at least one of its {total}", key=key
        )
    if max(keep) >= total:
        raise UserError(
            f"block {max(keep)} is to be kept of decoder {name}, which has blocks 0 … {total - 1}",
            key=key,
        )
    if keep != sorted(set(keep)):
        raise UserError(f"keep: {keep} must name each block once, in rising order", key=key)
    return keep


def shorten(config: Any, keep: list[int]) -> None:
    """Let ``config`` describe a model that ends with the last block to keep.

    Weights of further blocks are then neither made nor loaded.
    """
    config.num_hidden_layers = keep[-1] + 1
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: keep[-1] + 1]


def cut(model: Any, base: Any, keep: list[int]) -> None:
    """Drop the blocks between those to keep, and number these anew for the cache.

    Raises UserError for a model whose blocks are no list of their own, as BERT's.
    """
    total = keep[-1] + 1
    lists = [
        (name, module)
        for name, module in base.named_children()
        if isinstance(module, nn.ModuleList) and len(module) == total
    ]
    if not lists:
        raise UserError(
            f"the blocks of a {model.config.model_type!r} model cannot be told apart; take llama, "
            "gpt2, opt, mpt or another decoder of like build",
            key=_KEY,
        )
    name, blocks = lists[0]
    if len(keep) == total:
        return
    kept = nn.ModuleList(blocks[number] for number in keep)
    setattr(base, name, kept)
    for number, block in enumerate(kept):
        for module in block.modules():
            if hasattr(module, "layer_idx"):
                setattr(module, "layer_idx", number)  # noqa: B010  a plain number to its type
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [model.config.layer_types[number] for number in keep]
    model.config.num_hidden_layers = len(keep)
