"""Labels of an image one after another, by beams, or drawn at random."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.generate import draws
from engine.generate.one_shot import Found, finish, without
from engine.models.decoders.prefix import KVState, PrefixDecoder


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
        for said, token, ended in zip(ids, token_B.tolist(), ended_B.tolist(), strict=True):
            if not ended and token != separator_id:
                said.append(token)
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
        chosen = draws.processors(
            part_BKT.flatten(0, 1), temperature=temperature, top_k=top_k, top_p=top_p
        )

        def draw(log_p_BKV: Tensor, chosen: Sequence[object] = chosen) -> Tensor:
            scores_RV = log_p_BKV.flatten(0, 1)
            token_R = chosen(torch.zeros_like(scores_RV[:, :0]).long(), scores_RV).argmax(-1)  # type: ignore[operator]
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
