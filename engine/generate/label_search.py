"""Labels of an image: found in one go, one after another, by beams, or drawn at random.

In one go (NXTP, arXiv 2312.02142, section 3.4): the k likeliest first tokens behind the prompt
begin k labels. All are extended side by side, each to its separator by its likeliest tokens, over
one copy of the keys and values of image and prompt: a label adds those of its own tokens alone, and
sees no other label. A label's probability is the product over its tokens, the separator included.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.config.schema import Generate
from engine.errors import UserError
from engine.generate import texts
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
        if choose is None:  # as many columns as the image with most needs, the active ones first
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


def greedy(
    decoder: PrefixDecoder,
    state: KVState,
    *,
    separator_id: int,
    num_labels: int,
    room: int,
    nxtp: bool,
    per_label: bool,
) -> list[list[Found]]:
    """The likeliest label first, then the next, no first token twice: as text is generated.

    Each begins behind the prompt; by NXTP's rule behind the separator of the label before it, and
    at the position there, unless labels are ``per_label``.
    """
    state = state.fork()
    first_BD, start = state.last_BD, state.num_text
    place_B = torch.full_like(state.segment_BS[:, 0], start)
    taken_BV: Tensor | None = None
    found: list[list[Found]] = [[] for _ in first_BD]
    for number in range(1, num_labels + 1):
        log_p_BV = decoder.log_probs(first_BD)
        if taken_BV is None:
            taken_BV = torch.zeros_like(log_p_BV, dtype=torch.bool)
            taken_BV[:, separator_id] = True
        log_p_B, token_B = without(log_p_BV, taken_BV).max(-1)
        taken_BV.scatter_(1, token_B[:, None], True)
        label = _one_label(
            decoder, state, number, token_B, log_p_B, place_B,
            separator_id=separator_id, room=room, nxtp=nxtp,
        )  # fmt: skip
        for labels, ids, log_p, ended in zip(found, *label[:3], strict=True):
            if ended:
                labels.append(Found(tuple(ids), log_p))
        if nxtp:
            first_BD = label[3]
        if nxtp and not per_label:
            place_B = label[4]
    return found


def _one_label(
    decoder: PrefixDecoder,
    state: KVState,
    number: int,
    token_B: Tensor,
    log_p_B: Tensor,
    place_B: Tensor,
    *,
    separator_id: int,
    room: int,
    nxtp: bool,
) -> tuple[list[list[int]], list[float], list[bool], Tensor, Tensor]:
    """Ids, log p and whether it ended, of every image's next label; its separator's state and the
    position behind that, where the next label is to follow it."""
    ids: list[list[int]] = [[] for _ in token_B]
    ended_B = torch.zeros_like(token_B, dtype=torch.bool)
    state_BD = state.last_BD
    segment_B1 = torch.full_like(token_B[:, None], number)
    for _ in range(room):
        for one, token, ended in zip(ids, token_B.tolist(), ended_B.tolist(), strict=True):
            if not ended and token != separator_id:
                one.append(token)
        at_end_B = (token_B == separator_id) & ~ended_B
        ended_B = ended_B | at_end_B
        if ended_B.all() and not nxtp:
            break
        # those that have ended wait; what they read again nobody sees
        waiting_B1 = (ended_B & ~at_end_B)[:, None]
        hidden_BD = decoder.extend(
            state, token_B[:, None], torch.where(waiting_B1, -1, segment_B1), place_B[:, None]
        )[:, 0]
        state_BD = torch.where(at_end_B[:, None], hidden_BD, state_BD)
        place_B = place_B + ~waiting_B1[:, 0]
        if ended_B.all():
            break
        more_B, token_B = decoder.log_probs(hidden_BD).max(-1)
        log_p_B = log_p_B + torch.where(ended_B, 0.0, more_B)
        token_B = torch.where(ended_B, separator_id, token_B)
    return ids, log_p_B.tolist(), ended_B.tolist(), state_BD, place_B


def beam(
    decoder: PrefixDecoder,
    state: KVState,
    *,
    separator_id: int,
    num_beams: int,
    num_labels: int,
    room: int,
) -> list[list[Found]]:
    """The likeliest labels behind the prompt that ``num_beams`` beams come upon, best first."""
    start = state.num_text
    score_BW, ids_BW = without(decoder.log_probs(state.last_BD), separator_id).topk(num_beams)
    ids_BWT, found = ids_BW[..., None], [list[Found]() for _ in ids_BW]
    number_W = torch.arange(num_beams, device=ids_BW.device)
    for length in range(1, room):
        # Beams change places at each step: their few tokens are read anew, the prompt is not.
        rows = len(ids_BWT)
        position_T = start + torch.arange(length, device=ids_BW.device)
        hidden_BSD = decoder.extend(
            state.fork(),
            ids_BWT.flatten(1),
            (number_W + 1).repeat_interleave(length).expand(rows, -1),
            position_T.repeat(num_beams).expand(rows, -1),
        )
        hidden_BWD = hidden_BSD[:, length - 1 :: length]
        total_BWV = score_BW[..., None] + decoder.log_probs(hidden_BWD)
        _take_ended(found, ids_BWT, total_BWV[..., separator_id], num_labels)
        going_BWV = without(total_BWV, separator_id)
        score_BW, flat_BW = going_BWV.flatten(1).topk(num_beams)
        beam_BW, token_BW = flat_BW // going_BWV.shape[2], flat_BW % going_BWV.shape[2]
        kept_BWT = ids_BWT.gather(1, beam_BW[..., None].expand(-1, -1, length))
        ids_BWT = torch.cat([kept_BWT, token_BW[..., None]], dim=2)
        # a longer label is less likely than what it begins with
        best = score_BW[:, 0].tolist()
        if all(
            len(labels) == num_labels and labels[-1].log_p >= most
            for labels, most in zip(found, best, strict=True)
        ):
            break
    return found


def _take_ended(
    found: list[list[Found]], ids_BWT: Tensor, log_p_BW: Tensor, num_labels: int
) -> None:
    """Add beams that end here, and keep each image's best."""
    for labels, beams, log_ps in zip(found, ids_BWT.tolist(), log_p_BW.tolist(), strict=True):
        labels += [Found(tuple(ids), log_p) for ids, log_p in zip(beams, log_ps, strict=True)]
        labels.sort(key=lambda label: -label.log_p)
        del labels[num_labels:]


def sample(
    decoder: PrefixDecoder,
    state: KVState,
    *,
    separator_id: int,
    uniform_BKT: Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    rows: int,
) -> list[list[Found]]:
    """Labels drawn behind the prompt, each once, with their probabilities by the model itself.

    ``uniform_BKT`` are K labels' random numbers, one a token.
    """
    room = uniform_BKT.shape[2]
    first_BV = without(decoder.log_probs(state.last_BD), separator_id)
    found: list[dict[tuple[int, ...], Found]] = [{} for _ in first_BV]
    for part_BKT in uniform_BKT.split(rows, dim=1):
        images, labels = part_BKT.shape[:2]
        chosen = texts.processors(
            part_BKT.flatten(0, 1), temperature=temperature, top_k=top_k, top_p=top_p
        )

        def draw(log_p_BKV: Tensor, chosen: Callable[..., Tensor] = chosen) -> Tensor:
            scores_RV = log_p_BKV.flatten(0, 1)
            token_R = chosen(torch.zeros_like(scores_RV[:, :0]).long(), scores_RV).argmax(-1)
            return token_R.view(log_p_BKV.shape[:2])

        log_p_BKV = first_BV[:, None].expand(images, labels, -1)
        token_BK = draw(log_p_BKV)
        log_p_BK = log_p_BKV.gather(2, token_BK[..., None])[..., 0]
        complete = finish(
            decoder, state.fork(), token_BK, log_p_BK,
            separator_id=separator_id, room=room, choose=draw,
        )  # fmt: skip
        for known, more in zip(found, complete, strict=True):
            known.update({label.ids: label for label in more})
    return [list(known.values()) for known in found]


# --- how likely given labels are


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
    # tokens that are read, the label of each, and the token that each predicts
    read = [(token, number, place) for number, label in enumerate(labels)
            for place, token in enumerate(label[:-1])]  # fmt: skip
    following = [token for label in labels for token in label[1:]]
    if not following:
        return log_p_BK
    ids_S, number_S, place_S = torch.tensor(read, device=device).unbind(1)
    shape = (len(log_p_BK), -1)
    hidden_BSD = decoder.extend(
        state.fork(), ids_S.expand(shape), (number_S + 1).expand(shape),
        (start + place_S).expand(shape),
    )  # fmt: skip
    next_BS = torch.tensor(following, device=device).expand(shape)
    loss_R, _ = token_losses(hidden_BSD, next_BS, *decoder.head())  # never holds [B, S, V]
    return log_p_BK.index_add(1, number_S, -loss_R.view_as(next_BS))
