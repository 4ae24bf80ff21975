"""``truncated``: the first blocks of a causal language model, or chosen ones, for labels (NXTP).

See ``PrefixDecoder`` with ``label_mask``.
"""

from __future__ import annotations

from typing import Any

import transformers
from torch import nn

from engine.config.schema import Decoder as Section
from engine.errors import UserError
from engine.models.decoders import language_model as lm
from engine.models.decoders import prefix


def build(section: Section, *, vocab_size: int, pad_id: int, eos_id: int) -> prefix.PrefixDecoder:
    """The decoder that ``section`` describes. Raises UserError."""
    config = prefix.configuration(section, vocab_size, pad_id, eos_id)
    if getattr(config, "num_attention_heads", None) is None:
        raise _unfit(section, config, "has no attention by which labels are kept from others")
    keep = _kept_blocks(section, config.num_hidden_layers)
    # weights of blocks behind the last to keep are neither made nor loaded
    config.num_hidden_layers = total = keep[-1] + 1
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:total]
    may_grow = section.image_token is not None  # by the token's own row
    auto = transformers.AutoModelForCausalLM
    model = lm.load(auto, section, config, vocab_size, may_grow=may_grow)
    _cut(model, keep)
    decoder = prefix.PrefixDecoder(model, eos_id, label_mask=True)
    given = decoder.positions.takes_ids or decoder.positions.has_alibi
    if not given or getattr(config, "alibi", False):
        raise _unfit(section, config, "counts positions by itself, and labels need their own")
    return decoder


def _unfit(section: Section, config: Any, why: str) -> UserError:
    return UserError(
        f"a {config.model_type!r} model {why}; take llama, gpt2, opt, mpt or another with "
        "attention and position_ids",
        key=lm.part_of(section).model_key,
    )


def _kept_blocks(section: Section, total: int) -> list[int]:
    """Numbers of the blocks to keep of a model that has ``total``. Raises UserError."""
    number, chosen = section.num_blocks, section.keep
    if chosen is not None:
        keep, key = chosen, f"{lm.KEY}.keep"
    else:
        keep, key = list(range(total if number is None else number)), f"{lm.KEY}.num_blocks"
    name = lm.part_of(section).name  # decoder 'gpt2'
    if chosen is not None and number is not None:
        fault = f"num_blocks: {number} and keep: {chosen} both choose blocks; leave one out"
    elif not keep:
        fault = f"no block of {name} is kept; keep at least one of its {total}"
    elif max(keep) >= total:
        fault = f"block {max(keep)} is to be kept of {name}, which has blocks 0 … {total - 1}"
    elif keep != sorted(set(keep)):
        fault = f"keep: {keep} must name each block once, in rising order"
    else:
        return keep
    raise UserError(fault, key=key)


def _cut(model: Any, keep: list[int]) -> None:
    """Drop the blocks between those to keep, and renumber these for the cache.

    Raises UserError for a model whose blocks are not a list of their own, as BERT's.
    """
    total, base = keep[-1] + 1, model.get_decoder()
    lists = {n: m for n, m in base.named_children() if isinstance(m, nn.ModuleList)}
    name = next((name for name, blocks in lists.items() if len(blocks) == total), None)
    if name is None:
        raise UserError(
            f"the blocks of a {model.config.model_type!r} model are not a list of modules; take "
            "llama, gpt2, opt, mpt or another decoder that is built like them",
            key=lm.KEY,
        )
    if len(keep) == total:
        return
    kept = nn.ModuleList(lists[name][number] for number in keep)
    setattr(base, name, kept)
    for number, block in enumerate(kept):
        for module in block.modules():
            if hasattr(module, "layer_idx"):
                setattr(module, "layer_idx", number)  # noqa: B010  a plain number to its type
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [model.config.layer_types[number] for number in keep]
    model.config.num_hidden_layers = len(keep)
