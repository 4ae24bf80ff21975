"""Labels of images as texts: found by the method that is asked for, equal ones put together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import exp, log
from operator import add
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.config.schema import Generate
from engine.errors import UserError
from engine.generate import texts
from engine.generate.label_search import Found, Search
from engine.models.decoders.prefix import KVState, PrefixDecoder
from engine.models.vision_language import Recognizer
from engine.tasks.recognize import RecognizeTask


@dataclass(frozen=True, slots=True)
class Label:
    """A label of an image; ``score`` is what it is ranked by."""

    text: str
    prob: float  # of all token sequences that spell it, each with its separator
    score: float
    ids: tuple[int, ...]  # of the likeliest of these

    def to_json(self) -> dict[str, Any]:
        """As it stands in a line of JSON."""
        return {"label": self.text, "prob": self.prob, "score": self.score}


def check(section: Generate, vocab_size: int) -> None:
    """Raises UserError for what recognition cannot do: begin fewer labels than are asked for, or
    more than there are tokens beside the separator."""
    method, wanted = section.method, section.num_labels
    if method == "best_of_n":
        raise UserError(
            "best_of_n is for captions; labels are found by one_shot, greedy, beam or sample",
            key="generate.method",
        )
    if section.max_new_tokens == 1:
        raise UserError(
            "max_new_tokens 1 leaves room for a label's separator alone; a label takes 2 or more",
            key="generate.max_new_tokens",
        )
    drawn = section.num_samples if method == "sample" else wanted
    given = section.first_tokens if method == "one_shot" else None
    first = given or wanted
    for name, number, does in (("first_tokens", first, "begin"), ("num_samples", drawn, "draw")):
        if number < wanted:
            raise UserError(
                f"{name} {number} {does} fewer labels than num_labels {wanted}; raise the one or "
                "lower the other",
                key=f"generate.{name}",
            )
    name = "num_beams" if method == "beam" else "first_tokens" if given else "num_labels"
    begun = section.num_beams if method == "beam" else first
    if method != "sample" and begun > vocab_size - 1:
        raise UserError(
            f"{name} {begun} is more than the {vocab_size - 1} tokens that can begin a label",
            key=f"generate.{name}",
        )


def label_room(task: RecognizeTask, section: Generate) -> int:
    """Tokens that a generated label may have, its separator included."""
    room = task.room()
    return min(section.max_new_tokens or room, room)


class EncodedImages(NamedTuple):
    """Images as the decoder takes them, and what it knows of them and the prompt."""

    image_BND: Tensor
    state: KVState


def encode_prompt(task: RecognizeTask, model: Recognizer, image_BCHW: Tensor) -> EncodedImages:
    """Images and the prompt, read once for whatever is asked of them."""
    image_BND = model.image_tokens(image_BCHW)
    ids_P = task.prompt_ids().to(image_BND.device)
    return EncodedImages(image_BND, model.decoder.encode_prompt(image_BND, ids_P))


def recognise(
    task: RecognizeTask,
    model: Recognizer,
    encoded: EncodedImages,
    section: Generate,
    *,
    rows: Sequence[int] | None = None,
) -> list[list[Label]]:
    """Each image's labels, all that were found, by ``section.rank``; ``clip`` ranks nothing yet.

    Drawn ones depend on ``section.seed`` and the image's number in ``rows`` (by default its place).
    Raises UserError as ``check``.
    """
    check(section, len(model.decoder.head()[0]))
    numbers = range(len(encoded.image_BND)) if rows is None else rows
    found = _search(task, model.decoder, encoded.state, section, numbers)
    table_VD = model.decoder.model.get_input_embeddings().weight
    return [
        ranked(_labels(task, labels, section.rank, image_ND, table_VD), section.rank)
        for labels, image_ND in zip(found, encoded.image_BND, strict=True)
    ]


def _search(
    task: RecognizeTask,
    decoder: PrefixDecoder,
    state: KVState,
    section: Generate,
    rows: Sequence[int],
) -> list[list[Found]]:
    room, number = label_room(task, section), section.num_labels
    search = Search(decoder, state, task.separator_id, room)
    if section.method == "greedy":
        return search.greedy(number, nxtp=task.nxtp, per_label=task.per_label)
    if section.method == "beam":
        return search.beam(section.num_beams, number)
    if section.method == "sample":
        uniform_RT = texts.uniforms(section.seed, rows, section.num_samples, room)
        return search.sample(
            uniform_RT.view(len(rows), -1, room).to(state.last_BD.device), section.label_rows,
            temperature=section.temperature, top_k=section.top_k, top_p=section.top_p,
        )  # fmt: skip
    return search.one_shot(section.first_tokens or number, section.label_rows)


def _labels(
    task: RecognizeTask, found: Sequence[Found], rank: str, image_ND: Tensor, table_VD: Tensor
) -> list[Label]:
    """Labels as texts; of equal ones the probabilities are summed, and the best score is kept."""
    known: dict[str, Label] = {}
    found = found if rank == "none" else sorted(found, key=lambda one: -one.log_p)
    scores = [exp(one.log_p) for one in found]
    if rank == "ppl":
        scores = [exp(-one.log_p / (len(one.ids) + 1)) for one in found]
    elif rank == "sim" and found:
        scores = similarities(image_ND, [one.ids for one in found], table_VD).tolist()
    better = {"ppl": min, "sim": max}.get(rank, add)
    for label, score in zip(found, scores, strict=True):
        text, prob = task.tokenizer.decode(list(label.ids)), exp(label.log_p)
        if text in known:
            other = known[text]
            total, best = other.prob + prob, better(other.score, score)
            known[text] = replace(other, prob=total, score=best)
        elif text:  # not of special tokens alone
            known[text] = Label(text, prob, score, label.ids)
    return list(known.values())


def similarities(image_ND: Tensor, labels: Sequence[tuple[int, ...]], table_VD: Tensor) -> Tensor:
    """How near each label's tokens lie to the image's, in the decoder's space, [labels] in fp32:
    1 − the mean of half the distances of all pairs, each of length 1 (equation A.5 of NXTP, where
    less is nearer)."""
    device = image_ND.device
    lengths_K = torch.tensor([len(ids) for ids in labels], device=device)
    ids_T = torch.tensor([token for ids in labels for token in ids], device=device)
    number_T = torch.arange(len(labels), device=device).repeat_interleave(lengths_K)
    unit_ND, unit_TD = (F.normalize(x.float(), dim=-1) for x in (image_ND, table_VD[ids_T]))
    with torch.autocast(device.type, enabled=False):  # bf16 would make many of them equal
        distance_NT = (2 - 2 * unit_ND @ unit_TD.T).clamp_min(0).sqrt() / 2
    sum_K = distance_NT.new_zeros(len(labels)).index_add(0, number_T, distance_NT.mean(0))
    return 1 - sum_K / lengths_K


def ranked(labels: list[Label], rank: str) -> list[Label]:
    """The best label first: by the highest score, or the lowest perplexity; ``none`` changes
    nothing."""
    if rank == "none":
        return labels
    return sorted(labels, key=lambda label: label.score if rank == "ppl" else -label.score)


@torch.no_grad()
def attention_maps(
    task: RecognizeTask,
    model: Recognizer,
    image_1CHW: Tensor,
    labels: Sequence[tuple[int, ...]],
) -> Tensor:
    """Weights [labels, h, w] over one image, its rows from the top; ``labels`` are tokens.

    A label's tokens are read behind image and prompt, as in training. The weights that they give to
    the image's tokens are averaged over blocks, heads and the label's tokens. They show where the
    decoder took its values from, which is not the same as why it chose the label.
    """
    if not labels:
        return torch.zeros(0, 1, 1)
    decoder, device = model.decoder, image_1CHW.device
    encoded = encode_prompt(task, model, image_1CHW)
    start, num_image = encoded.state.num_text, encoded.state.num_image
    ids = [(token, number, start + place) for number, label in enumerate(labels)
           for place, token in enumerate(label)]  # fmt: skip
    ids_S, number_S, position_S = torch.tensor(ids, device=device).unbind(1)
    with eager(decoder.model):
        output = decoder.extend(
            encoded.state, ids_S[None], number_S[None] + 1, position_S[None], output_attentions=True
        )
    weights_LSN = torch.stack([w[0].float().mean(0)[:, :num_image] for w in output.attentions])
    sums_KN = weights_LSN.new_zeros(len(labels), num_image)
    sums_KN.index_add_(0, number_S, weights_LSN.mean(0))
    mean_KN = sums_KN / torch.tensor([[len(label)] for label in labels], device=device)
    if model.keep_prefix:  # class tokens are nowhere in the image
        mean_KN = mean_KN[:, model.image_encoder.num_prefix_tokens :]
    height, width = grid(mean_KN.shape[1], image_1CHW.shape[2] / image_1CHW.shape[3])
    return mean_KN.view(-1, height, width)


def grid(num_tokens: int, ratio: float) -> tuple[int, int]:
    """Rows and columns that so many tokens lie in, of an image ``ratio`` times as high as wide."""
    rows = [n for n in range(1, num_tokens + 1) if num_tokens % n == 0]
    height = min(rows, key=lambda n: abs(log(n * n / num_tokens / ratio)))
    return height, num_tokens // height


@contextmanager
def eager(model: Any) -> Iterator[None]:
    """Attention that gives its weights away, within the block."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)
