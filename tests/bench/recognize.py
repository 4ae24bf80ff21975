"""Labels of an image: one shot beside one label after another, and beside the form without a cache.

    python -m tests.bench recognize [--threads N]

All are given the same image tokens, weights and prompt, and begin twenty labels; reading image and
prompt is part of each. Generated greedily, labels follow one another as a text, token by token over
a cache. One by one, each is begun behind the prompt, and its separator is not read: the same labels
as in one shot. The form without a cache is that of NXTP's code: every label's whole row, image and
all, is read anew for each token; the same labels too. Runs take turns A B B A.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from engine.config.schema import Decoder as Section
from engine.generate.label_search import Found, Search
from engine.models.decoders.prefix import PrefixDecoder
from engine.registry import find
from tests.bench.table import Line, Options
from tests.bench.timing import in_turns, peak_bytes, ratio

NUM_LABELS, ROOM = 20, 4  # a label has one to three tokens, as words have, and its separator
VOCABULARY, SEPARATOR = 8192, 5
NUM_IMAGE, PROMPT = 256, [1, 11, 12, 13, 14, 15, 16, 17]  # tokens: ViT-L/14 at 224 pixels
FULL = {"hidden_size": 256, "intermediate_size": 688, "num_attention_heads": 4}
QUICK = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
Labels = list[Found]


def make(quick: bool) -> PrefixDecoder:
    """Six blocks of a LLaMA from random weights; the separator follows two tokens in five."""
    torch.manual_seed(0)
    sizes = {"model_type": "llama", "num_hidden_layers": 6, **(QUICK if quick else FULL)}
    decoder = find("models/decoders", "truncated").build(
        Section(name="truncated", config=sizes), vocab_size=VOCABULARY, pad_id=0, eos_id=2
    )
    decoder.eval().requires_grad_(False)
    for parameter in decoder.parameters():
        if parameter.ndim > 1:
            parameter.mul_(4)
    decoder.head()[0][SEPARATOR] *= 20
    return decoder


@torch.no_grad()
def uncached(decoder: PrefixDecoder, image_1ND: Tensor) -> Labels:
    """A row for each label, all of it read anew at each token."""
    embed = decoder.model.get_input_embeddings()
    base: Any = decoder.base[0]
    prompt_1PD = embed(torch.tensor([PROMPT]))
    x_KSD = torch.cat([image_1ND, prompt_1PD], dim=1)
    ids_KT = torch.zeros(1, 0, dtype=torch.int64)
    log_p_K = torch.zeros(1)
    ended_K = torch.zeros(1, dtype=torch.bool)
    for step in range(ROOM):
        length = x_KSD.shape[1]
        sees_SS = torch.ones(length, length).tril()
        sees_SS[:NUM_IMAGE, :NUM_IMAGE] = 1
        mask = torch.zeros(length, length).masked_fill(sees_SS == 0, torch.finfo().min)
        hidden_KD = base(
            inputs_embeds=x_KSD, attention_mask=mask.expand(len(x_KSD), 1, -1, -1), use_cache=False
        ).last_hidden_state[:, -1]
        log_p_KV = decoder.log_probs(hidden_KD)
        if step == 0:
            log_p_KV[:, SEPARATOR] = -torch.inf
            log_p_K, token_K = log_p_KV[0].topk(NUM_LABELS)
            x_KSD = x_KSD.expand(NUM_LABELS, -1, -1)
            ids_KT, ended_K = ids_KT.expand(NUM_LABELS, -1), ended_K.expand(NUM_LABELS)
        else:
            more_K, token_K = log_p_KV.max(-1)
            log_p_K = log_p_K + torch.where(ended_K, 0.0, more_K)
        token_K = torch.where(ended_K, SEPARATOR, token_K)
        ids_KT = torch.cat([ids_KT, token_K[:, None]], dim=1)
        ended_K = ended_K | (token_K == SEPARATOR)
        if ended_K.all():
            break
        x_KSD = torch.cat([x_KSD, embed(token_K)[:, None]], dim=1)
    rows = zip(ids_KT.tolist(), log_p_K.tolist(), ended_K.tolist(), strict=True)
    return [Found(tuple(ids[: ids.index(SEPARATOR)]), p) for ids, p, ended in rows if ended]


def rows(options: Options) -> Iterator[Line]:
    """One shot, beside both."""
    torch.set_num_threads(options.threads)
    decoder = make(options.quick)
    image_1ND = torch.randn(1, NUM_IMAGE, decoder.width)
    prompt_P = torch.tensor(PROMPT)

    def at_once() -> Labels:
        state = decoder.encode_prompt(image_1ND, prompt_P)
        return Search(decoder, state, SEPARATOR, ROOM).one_shot(NUM_LABELS, NUM_LABELS)[0]

    def in_turn(as_text: bool) -> Labels:
        state = decoder.encode_prompt(image_1ND, prompt_P)
        search = Search(decoder, state, SEPARATOR, ROOM)
        return search.greedy(NUM_LABELS, nxtp=as_text, per_label=not as_text)[0]

    same: dict[str, Callable[[], Labels]] = {
        "one shot": at_once,
        "one by one": lambda: in_turn(False),
        "uncached": lambda: uncached(decoder, image_1ND),
    }
    work = same | {"greedy generation": lambda: in_turn(True)}
    with torch.no_grad():
        found = {name: run() for name, run in same.items()}
        told = [label.ids for label in found["one shot"]]
        for labels in found.values():  # before anything is timed
            assert [label.ids for label in labels] == told and told
            assert all(abs(a.log_p - b.log_p) < 1e-3
                       for a, b in zip(labels, found["one shot"], strict=True))  # fmt: skip
        tokens = sum(map(len, told)) + len(told)
        seconds = in_turns(work, options.repeats)
        prefill = in_turns(
            {"read": lambda: decoder.encode_prompt(image_1ND, prompt_P)}, options.repeats
        )
        peaks = {name: peak_bytes(work[name]) for name in ("one shot", "uncached")}
    limit = min(prefill["read"])
    for peer, mark in (("greedy generation", "≥ 5"), ("uncached", "≥ 3"), ("one by one", "")):
        yield Line(
            f"{NUM_LABELS} labels ({len(told)} end, {tokens} tokens), one shot beside {peer}",
            ours=min(seconds["one shot"]), peer=min(seconds[peer]), limit=limit, mark=mark,
            unit=" s", **ratio(seconds[peer], seconds["one shot"]),
        )  # fmt: skip
    yield Line(
        "peak memory of one shot beside uncached", ours=peaks["one shot"] / 2**20,
        peer=peaks["uncached"] / 2**20, ratio=peaks["uncached"] / max(peaks["one shot"], 1),
        unit=" MiB",
    )  # fmt: skip
