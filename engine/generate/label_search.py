"""Labels of an image: found in one go, one after another, by beams, or drawn at random.

In one go (NXTP, arXiv 2312.02142, section 3.4): the k likeliest first tokens behind the prompt
begin k labels. All are extended side by side, each to its separator by its likeliest tokens, over
one copy of the keys and values of image and prompt: a label adds those of its own tokens alone, and
sees no other label. A label's probability is the product over its tokens, the separator included.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from engine.generate import texts
from engine.losses.language_model import token_losses
from engine.models.decoders.prefix import KVState, PrefixDecoder


@dataclass(frozen=True, slots=True)
class Found:
    """A label's tokens without its separator, and log p of them and the separator."""

    ids: tuple[int, ...]
    log_p: float


@dataclass(frozen=True, slots=True)
class Search:
    """What is looked for behind images and prompts that a decoder has read.

    ``room`` bounds a label's tokens, separator included; one that does not end by then is left out.
    """

    decoder: PrefixDecoder
    state: KVState
    separator_id: int
    room: int

    def one_shot(self, num_first: int, rows: int) -> list[list[Found]]:
        """Each image's labels, the likelier first token first; ``rows`` of them at a time."""
        log_p_BK, ids_BK = self._first().topk(num_first)
        found: list[list[Found]] = [[] for _ in ids_BK]
        for first, log_p in zip(ids_BK.split(rows, 1), log_p_BK.split(rows, 1), strict=True):
            for labels, more in zip(found, self._finish(first, log_p), strict=True):
                labels += more
        return found

    def _first(self) -> Tensor:
        """log p [B, V] of the tokens that can begin a label."""
        return _without(self.decoder.log_probs(self.state.last_BD), self.separator_id)

    def _finish(
        self,
        first_BK: Tensor,
        log_p_BK: Tensor,
        choose: Callable[[Tensor], Tensor] | None = None,
    ) -> list[list[Found]]:
        """Labels from their first tokens on, side by side.

        ``choose`` takes tokens [B, K] by their log p [B, K, V], by default the likeliest; labels
        that have ended are then read no further.
        """
        num_images, num_labels = first_BK.shape
        state, end = self.state.fork(), self.separator_id
        start = state.num_text  # the position behind the prompt
        ids_BKT = first_BK.new_full((num_images, num_labels, self.room), end)
        ids_BKT[..., 0] = first_BK
        log_p_BK = log_p_BK.clone()
        active_BA = torch.arange(num_labels, device=first_BK.device).expand(num_images, -1)
        ended_BK = torch.zeros_like(first_BK, dtype=torch.bool)
        for step in range(1, self.room):
            last_BA = ids_BKT[..., step - 1].gather(1, active_BA)
            position_BA = torch.full_like(last_BA, start + step - 1)
            hidden_BAD = self.decoder.extend(state, last_BA, active_BA + 1, position_BA)
            next_BAV = self.decoder.log_probs(hidden_BAD)
            token_BA = next_BAV.argmax(-1) if choose is None else choose(next_BAV)
            more_BA = next_BAV.gather(2, token_BA[..., None])[..., 0]
            going_BA = ~ended_BK.gather(1, active_BA)
            token_BA = torch.where(going_BA, token_BA, end)
            ids_BKT[..., step].scatter_(1, active_BA, token_BA)
            log_p_BK.scatter_add_(1, active_BA, torch.where(going_BA, more_BA, 0.0))
            ended_BK.scatter_(1, active_BA, token_BA == end)
            num_active = int((~ended_BK).sum(1).max())
            if num_active == 0:
                break
            if choose is None:  # as many columns as the image with most needs, active ones first
                active_BA = ended_BK.to(torch.uint8).argsort(dim=1, stable=True)[:, :num_active]
        return _collect(ids_BKT, log_p_BK, ended_BK, end)

    def greedy(self, num_labels: int, *, nxtp: bool, per_label: bool) -> list[list[Found]]:
        """The likeliest label first, then the next, no first token twice: as text is generated.

        Each begins behind the prompt; by NXTP's rule behind the separator of the label before it,
        and at the position there, unless labels are ``per_label``.
        """
        decoder, state, end = self.decoder, self.state.fork(), self.separator_id
        first_BD = state.last_BD
        place_B = torch.full_like(state.segment_BS[:, 0], state.num_text)
        taken_BV = first_BD.new_zeros(len(first_BD), len(decoder.head()[0]), dtype=torch.bool)
        taken_BV[:, end] = True
        found: list[list[Found]] = [[] for _ in first_BD]
        for number in range(1, num_labels + 1):
            log_p_BV = decoder.log_probs(first_BD).masked_fill(taken_BV, -torch.inf)
            log_p_B, token_B = log_p_BV.max(-1)
            taken_BV.scatter_(1, token_B[:, None], True)
            ids_BT = token_B.new_full((len(token_B), self.room), end)
            ended_B = torch.zeros_like(token_B, dtype=torch.bool)
            after_BD, next_B = state.last_BD, place_B  # the separator's state, what is behind it
            for step in range(self.room):
                ids_BT[:, step] = token_B
                waiting_B, ended_B = ended_B, token_B == end
                if ended_B.all() and not nxtp:
                    break
                # those that wait are read again as a segment that nobody sees
                segment_B1 = torch.where(waiting_B, -1, number)[:, None]
                hidden_B1D = decoder.extend(state, token_B[:, None], segment_B1, next_B[:, None])
                after_BD = torch.where((ended_B & ~waiting_B)[:, None], hidden_B1D[:, 0], after_BD)
                next_B = next_B + ~waiting_B
                if ended_B.all():
                    break
                more_B, token_B = decoder.log_probs(hidden_B1D[:, 0]).max(-1)
                log_p_B = log_p_B + torch.where(ended_B, 0.0, more_B)
                token_B = torch.where(ended_B, end, token_B)
            ended = _collect(ids_BT[:, None], log_p_B[:, None], ended_B[:, None], end)
            for labels, more in zip(found, ended, strict=True):
                labels += more
            if nxtp:
                first_BD, place_B = after_BD, place_B if per_label else next_B
        return found

    def beam(self, num_beams: int, num_labels: int) -> list[list[Found]]:
        """The likeliest labels behind the prompt that the beams come upon, best first."""
        score_BW, ids_BW = self._first().topk(num_beams)
        ids_BWT, found = ids_BW[..., None], [list[Found]() for _ in ids_BW]
        number_W = torch.arange(num_beams, device=ids_BW.device)
        for length in range(1, self.room):
            # Beams change places at each step: their few tokens are read anew, the prompt is not.
            shape = len(ids_BWT), -1
            position_T = self.state.num_text + torch.arange(length, device=ids_BW.device)
            segment_S = (number_W + 1).repeat_interleave(length)
            hidden_BSD = self.decoder.extend(
                self.state.fork(), ids_BWT.flatten(1), segment_S.expand(shape),
                position_T.repeat(num_beams).expand(shape),
            )  # fmt: skip
            last_BWD = hidden_BSD[:, length - 1 :: length]
            total_BWV = score_BW[..., None] + self.decoder.log_probs(last_BWD)
            _take_ended(found, ids_BWT, total_BWV[..., self.separator_id], num_labels)
            going_BWV = _without(total_BWV, self.separator_id)
            score_BW, flat_BW = going_BWV.flatten(1).topk(num_beams)
            beam_BW, token_BW = flat_BW // going_BWV.shape[2], flat_BW % going_BWV.shape[2]
            kept_BWT = ids_BWT.gather(1, beam_BW[..., None].expand(-1, -1, length))
            ids_BWT = torch.cat([kept_BWT, token_BW[..., None]], dim=2)
            # a longer label is less likely than what it begins with
            if all(
                len(labels) == num_labels and labels[-1].log_p >= best
                for labels, best in zip(found, score_BW[:, 0].tolist(), strict=True)
            ):
                break
        return found

    def sample(
        self, uniform_BKT: Tensor, rows: int, *, temperature: float, top_k: int, top_p: float
    ) -> list[list[Found]]:
        """Labels drawn behind the prompt, each once, with their probabilities by the model itself.

        ``uniform_BKT`` are K labels' random numbers, one for each token of ``room``.
        """
        first_BV = self._first()
        found: list[dict[tuple[int, ...], Found]] = [{} for _ in first_BV]
        for part_BKT in uniform_BKT.split(rows, dim=1):
            chosen = texts.processors(
                part_BKT.flatten(0, 1), temperature=temperature, top_k=top_k, top_p=top_p
            )

            def draw(log_p_BKV: Tensor, chosen: Callable[..., Tensor] = chosen) -> Tensor:
                scores_RV = log_p_BKV.flatten(0, 1)
                token_R = chosen(torch.zeros_like(scores_RV[:, :0]).long(), scores_RV).argmax(-1)
                return token_R.view(log_p_BKV.shape[:2])

            log_p_BKV = first_BV[:, None].expand(*part_BKT.shape[:2], -1)
            token_BK = draw(log_p_BKV)
            log_p_BK = log_p_BKV.gather(2, token_BK[..., None])[..., 0]
            complete = self._finish(token_BK, log_p_BK, draw)
            for known, more in zip(found, complete, strict=True):
                known.update({label.ids: label for label in more})
        return [list(known.values()) for known in found]


def _collect(
    ids_BKT: Tensor, log_p_BK: Tensor, ended_BK: Tensor, separator_id: int
) -> list[list[Found]]:
    """The labels that have ended."""
    columns = zip(ids_BKT.tolist(), log_p_BK.tolist(), ended_BK.tolist(), strict=True)
    return [
        [
            Found(tuple(ids[: ids.index(separator_id)]), log_p)
            for ids, log_p, ended in zip(*of_image, strict=True)
            if ended
        ]
        for of_image in columns
    ]


def _without(log_p: Tensor, token: int) -> Tensor:
    """log p [..., V] with −∞ at a token."""
    out = log_p.clone()
    out[..., token] = -torch.inf
    return out


def _take_ended(
    found: list[list[Found]], ids_BWT: Tensor, log_p_BW: Tensor, num_labels: int
) -> None:
    """Add beams that end here, and keep each image's best."""
    for labels, beams, log_ps in zip(found, ids_BWT.tolist(), log_p_BW.tolist(), strict=True):
        labels += [Found(tuple(ids), log_p) for ids, log_p in zip(beams, log_ps, strict=True)]
        labels.sort(key=lambda label: -label.log_p)
        del labels[num_labels:]


def label_log_probs(
    decoder: PrefixDecoder, state: KVState, labels: list[tuple[int, ...]], *, rows: int
) -> Tensor:
    """log p [B, labels] of given labels, each with its separator at its end, for every image.

    ``rows`` labels are read at a time, side by side.
    """
    first_BV, shape = decoder.log_probs(state.last_BD), (len(state.last_BD), -1)
    parts = [first_BV[:, :0]]
    for start in range(0, len(labels), rows):
        some = labels[start : start + rows]
        log_p_BK = first_BV[:, [label[0] for label in some]]
        # the label of each token that is read, its place there, itself, and the token it predicts
        read = [
            (number, place, *pair)
            for number, label in enumerate(some)
            for place, pair in enumerate(pairwise(label))
        ]
        if read:
            number_S, place_S, ids_S, next_S = torch.tensor(read, device=first_BV.device).unbind(1)
            hidden_BSD = decoder.extend(
                state.fork(), ids_S.expand(shape), (number_S + 1).expand(shape),
                (state.num_text + place_S).expand(shape),
            )  # fmt: skip
            # never holds [B, S, V]
            loss_R, _ = token_losses(
                hidden_BSD.to(first_BV.dtype), next_S.expand(shape), *decoder.head()
            )
            log_p_BK = log_p_BK.index_add(1, number_S, -loss_R.view(len(first_BV), -1))
        parts.append(log_p_BK)
    return torch.cat(parts, dim=1)
