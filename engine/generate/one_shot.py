"""Labels of an image in one go (NXTP, arXiv 2312.02142, section 3.4).

The k likeliest first tokens behind the prompt begin k labels. All are gone on with side by side,
each to its separator by its likeliest tokens, over one copy of what was read of image and prompt: a
label adds keys and values of its own tokens alone, and sees no other. A label's probability is the
product over its tokens, the separator included.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.config.schema import Generate
from engine.errors import UserError
from engine.losses.language_model import token_losses
from engine.models.decoders.prefix import KVState, PrefixDecoder

Choose = Callable[[Tensor], Tensor]
"""log p [B, K, V] of next tokens → the tokens taken, int64 [B, K]."""


@dataclass(frozen=True, slots=True)
class Found:
    """A label's tokens without its separator, and log p of them and the separator."""

    ids: tuple[int, ...]
    log_p: float


def num_first_tokens(section: Generate, vocab_size: int) -> int:
    """Labels that ``one_shot`` begins. Raises UserError for more than there are tokens, and for
    fewer than the labels that are asked for: a first token gives one label at most."""
    number = section.first_tokens or section.num_labels
    if number < section.num_labels:
        raise UserError(
            f"first_tokens {number} begin fewer labels than num_labels {section.num_labels}; raise "
            "the one or lower the other",
            key="generate.first_tokens",
        )
    if number > vocab_size - 1:  # the separator begins none
        key = "first_tokens" if section.first_tokens else "num_labels"
        raise UserError(
            f"{key} {number} is more than the {vocab_size - 1} tokens that can begin a label",
            key=f"generate.{key}",
        )
    return number


def one_shot(
    decoder: PrefixDecoder,
    state: KVState,
    *,
    separator_id: int,
    num_first: int,
    room: int,
    rows: int,
) -> list[list[Found]]:
    """Each image's labels, the likelier first token first; ``rows`` of them at a time.

    ``room`` bounds a label's tokens, separator included; one that does not end by then is none.
    """
    first_BV = without(decoder.log_probs(state.last_BD), separator_id)
    log_p_BK, ids_BK = first_BV.topk(num_first)
    found: list[list[Found]] = [[] for _ in ids_BK]
    for start in range(0, num_first, rows):
        part = slice(start, start + rows)
        complete = finish(
            decoder, state.fork(), ids_BK[:, part], log_p_BK[:, part],
            separator_id=separator_id, room=room,
        )  # fmt: skip
        for labels, more in zip(found, complete, strict=True):
            labels += more
    return found


def finish(
    decoder: PrefixDecoder,
    state: KVState,
    first_BK: Tensor,
    log_p_BK: Tensor,
    *,
    separator_id: int,
    room: int,
    choose: Choose | None = None,
) -> list[list[Found]]:
    """Labels from their first tokens on, side by side behind ``state``, which is extended.

    ``choose`` takes the next tokens, by default the likeliest. Labels that have ended are read no
    further. A label that does not end within ``room`` tokens is left out.
    """
    num_images, num_labels = first_BK.shape
    start = state.num_text  # the position behind the prompt
    ids_BKT = first_BK.new_full((num_images, num_labels, room), separator_id)
    ids_BKT[..., 0] = first_BK
    log_p_BK = log_p_BK.clone()
    active_BA = torch.arange(num_labels, device=first_BK.device).expand(num_images, -1)
    ended_BK = torch.zeros_like(first_BK, dtype=torch.bool)
    for step in range(1, room):
        last_BA = ids_BKT[..., step - 1].gather(1, active_BA)
        position_BA = torch.full_like(last_BA, start + step - 1)
        hidden_BAD = decoder.extend(state, last_BA, active_BA + 1, position_BA)
        next_BAV = decoder.log_probs(hidden_BAD)
        token_BA = next_BAV.argmax(-1) if choose is None else choose(next_BAV)
        more_BA = next_BAV.gather(2, token_BA[..., None])[..., 0]
        going_BA = ~ended_BK.gather(1, active_BA)
        token_BA = torch.where(going_BA, token_BA, separator_id)
        ids_BKT[..., step].scatter_(1, active_BA, token_BA)
        log_p_BK.scatter_add_(1, active_BA, torch.where(going_BA, more_BA, 0.0))
        ended_BK.scatter_(1, active_BA, token_BA == separator_id)
        num_active = int((~ended_BK).sum(1).max())
        if num_active == 0:
            break
        if choose is None:  # as many columns as the image with most needs, those to go on first
            active_BA = ended_BK.to(torch.uint8).argsort(dim=1, stable=True)[:, :num_active]
    return _collect(ids_BKT, log_p_BK, ended_BK, separator_id)


def _collect(
    ids_BKT: Tensor, log_p_BK: Tensor, ended_BK: Tensor, separator_id: int
) -> list[list[Found]]:
    found = []
    for rows, log_ps, ended in zip(
        ids_BKT.tolist(), log_p_BK.tolist(), ended_BK.tolist(), strict=True
    ):
        labels = [
            Found(tuple(ids[: ids.index(separator_id)]), log_p)
            for ids, log_p, done in zip(rows, log_ps, ended, strict=True)
            if done
        ]
        found.append(labels)
    return found


def without(log_p: Tensor, token: int | Tensor) -> Tensor:
    """log p [..., V] with −∞ at a token, or where a mask [..., V] says."""
    out = log_p.clone()
    if isinstance(token, int):
        out[..., token] = -torch.inf
        return out
    return out.masked_fill_(token, -torch.inf)


def label_log_probs(
    decoder: PrefixDecoder, state: KVState, labels: list[tuple[int, ...]], *, rows: int
) -> Tensor:
    """log p [B, labels] of given labels, each with its separator at its end, for every image.

    ``rows`` labels are read at a time, side by side.
    """
    parts = [state.last_BD.new_zeros(len(state.last_BD), 0)]
    parts += [
        _some_log_probs(decoder, state, labels[start : start + rows])
        for start in range(0, len(labels), rows)
    ]
    return torch.cat(parts, dim=1)


def _some_log_probs(
    decoder: PrefixDecoder, state: KVState, labels: list[tuple[int, ...]]
) -> Tensor:
    device, start = state.last_BD.device, state.num_text
    first_K = torch.tensor([label[0] for label in labels], device=device)
    log_p_BK = decoder.log_probs(state.last_BD)[:, first_K]
    # tokens that are read, the label of each, and what they tell
    read = [(token, number, place) for number, label in enumerate(labels)
            for place, token in enumerate(label[:-1])]  # fmt: skip
    told = [token for label in labels for token in label[1:]]
    if not told:
        return log_p_BK
    ids_S, number_S, place_S = torch.tensor(read, device=device).unbind(1)
    shape = (len(log_p_BK), -1)
    hidden_BSD = decoder.extend(
        state.fork(), ids_S.expand(shape), (number_S + 1).expand(shape),
        (start + place_S).expand(shape),
    )  # fmt: skip
    told_BS = torch.tensor(told, device=device).expand(shape)
    loss_R, _ = token_losses(hidden_BSD, told_BS, *decoder.head())  # never holds [B, S, V]
    return log_p_BK.index_add(1, number_S, -loss_R.view_as(told_BS))
