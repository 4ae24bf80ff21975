"""``truncated``: the first blocks of a causal language model, or chosen ones, for labels (NXTP).

See ``PrefixDecoder`` with ``label_mask``.
"""

from __future__ import annotations

from typing import Any

from torch import nn

import engine.torchvision_ops  # noqa: F401  before transformers, which imports torchvision

import transformers  # isort: skip
from engine.config.schema import Decoder as Section
from engine.errors import UserError
from engine.models.decoders import language_model as lm
from engine.models.decoders import prefix
from engine.models.decoders.prefix import PrefixDecoder


def build(section: Section, *, vocab_size: int, pad_id: int, eos_id: int) -> PrefixDecoder:
    """The decoder that ``section`` describes. Raises UserError."""
    config, key = prefix.configuration(section, vocab_size, pad_id, eos_id)
    if getattr(config, "num_attention_heads", None) is None:
        raise UserError(
            f"a {config.model_type!r} model has no attention by which a label is kept from "
            "seeing others; take llama, gpt2, opt, mpt or another with attention",
            key=key,
        )
    keep = _kept_blocks(section, config.num_hidden_layers)
    _shorten(config, keep)
    model = lm.load(transformers.AutoModelForCausalLM, section, config)
    missing = vocab_size - model.get_input_embeddings().num_embeddings
    if section.image_token is not None and missing == 1:
        model.resize_token_embeddings(vocab_size, mean_resizing=False)  # by the token's own row
    _cut(model, keep)
    decoder = prefix.make(model, section, vocab_size, eos_id, label_mask=True)
    given = decoder.positions.takes_ids or decoder.positions.has_alibi
    if not given or getattr(config, "alibi", False):
        raise UserError(
            f"a {config.model_type!r} model counts positions by itself, and labels that share a "
            "row need their own; take llama, gpt2, opt, mpt or another with position_ids",
            key=key,
        )
    return decoder


def _kept_blocks(section: Section, total: int) -> list[int]:
    """Numbers of the blocks to keep of a model that has ``total``. Raises UserError."""
    if section.keep is not None and section.num_blocks is not None:
        raise UserError(
            f"num_blocks: {section.num_blocks} and keep: {section.keep} both choose blocks; leave "
            "one out",
            key=f"{lm.KEY}.keep",
        )
    name = lm.part_of(section).name
    key = f"{lm.KEY}.num_blocks" if section.keep is None else f"{lm.KEY}.keep"
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


def _shorten(config: Any, keep: list[int]) -> None:
    """Let ``config`` describe a model that ends with the last block to keep.

    Weights of further blocks are then neither made nor loaded.
    """
    config.num_hidden_layers = keep[-1] + 1
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: keep[-1] + 1]


def _cut(model: Any, keep: list[int]) -> None:
    """Drop the blocks between those to keep, and renumber these for the cache.

    Raises UserError for a model whose blocks are not a list of their own, as BERT's.
    """
    total = keep[-1] + 1
    lists = [
        (name, module)
        for name, module in model.get_decoder().named_children()
        if isinstance(module, nn.ModuleList) and len(module) == total
    ]
    if not lists:
        raise UserError(
            f"the blocks of a {model.config.model_type!r} model are not a list of modules; take "
            "llama, gpt2, opt, mpt or another decoder that is built like them",
            key=lm.KEY,
        )
    name, blocks = lists[0]
    if len(keep) == total:
        return
    kept = nn.ModuleList(blocks[number] for number in keep)
    setattr(model.get_decoder(), name, kept)
    for number, block in enumerate(kept):
        for module in block.modules():
            if hasattr(module, "layer_idx"):
                setattr(module, "layer_idx", number)  # noqa: B010  a plain number to its type
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [model.config.layer_types[number] for number in keep]
    model.config.num_hidden_layers = len(keep)
