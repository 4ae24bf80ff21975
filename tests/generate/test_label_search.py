"""Labels in one go, one by one, by beams and drawn: against loops that keep nothing in a cache."""

from __future__ import annotations

import itertools
from math import exp
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.config.schema import Generate
from engine.data.text.labels import lay_out, stack
from engine.errors import UserError
from engine.generate.label_search import Found, Search, label_log_probs
from engine.generate.labels import check
from engine.generate.texts import uniforms
from tests.models.decoders.test_decoders import VOCABULARY
from tests.models.decoders.test_truncated import (  # noqa: F401  a fixture among them
    FAMILIES,
    PROMPT,
    SEPARATOR,
    images,
    wide_softmax,
)
from tests.models.decoders.test_truncated import make as plain

ROOM, K = 6, 20


def make(family: str) -> Any:
    """A decoder to which the separator comes easily."""
    decoder = plain(family).requires_grad_(False)
    decoder.head()[0][SEPARATOR] *= 4
    return decoder


def next_log_p(decoder, image_1ND: Tensor, label: list[int]) -> Tensor:
    """log p [V] of what follows the prompt and a label so far: everything is read anew."""
    row = lay_out(PROMPT, [label], nxtp=False, per_label=True) if label else None
    row = row or lay_out(PROMPT, [], nxtp=False, per_label=True)
    return decoder.log_probs(decoder.label_hidden(image_1ND, stack([row], 0))[0, -1])


def slow(decoder, image_1ND: Tensor, first: int, room: int = ROOM) -> Found | None:
    """A label from its first token on, by its likeliest tokens."""
    log_p = float(next_log_p(decoder, image_1ND, [])[first])
    label = [first]
    while len(label) < room:
        following = next_log_p(decoder, image_1ND, label)
        token = int(following.argmax())
        log_p += float(following[token])
        if token == SEPARATOR:
            return Found(tuple(label), log_p)
        label.append(token)
    return None


def slow_one_shot(decoder, image_1ND: Tensor, count: int = K) -> list[Found]:
    first = next_log_p(decoder, image_1ND, [])
    first[SEPARATOR] = -torch.inf
    labels = [slow(decoder, image_1ND, int(token)) for token in first.topk(count).indices]
    return [label for label in labels if label is not None]


def read(decoder, rows: int) -> Any:
    return decoder.encode_prompt(images(rows), torch.tensor(PROMPT))


def assert_equal(got: list[Found], want: list[Found], near: float) -> None:
    assert [label.ids for label in got] == [label.ids for label in want]
    assert [label.log_p for label in got] == pytest.approx([w.log_p for w in want], abs=near)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_shot_equals_labels_read_anew_at_each_token(family: str) -> None:
    decoder = make(family)
    state = read(decoder, 3)
    found = Search(decoder, state, SEPARATOR, ROOM).one_shot(K, rows=K)
    wanted = [slow_one_shot(decoder, images(3)[row : row + 1]) for row in range(3)]
    lengths = {len(label.ids) for labels in wanted for label in labels}
    assert len(lengths) > 1 and any(len(labels) < K for labels in wanted)  # some do not end
    for got, want in zip(found, wanted, strict=True):
        assert_equal(got, want, 1e-9)
        probs = [exp(label.log_p) for label in got]
        assert probs == pytest.approx([exp(label.log_p) for label in want], abs=1e-6)
    # their probabilities are those of the same labels given, whatever is read side by side
    for row, labels in enumerate(found):
        given = [(*label.ids, SEPARATOR) for label in labels]
        log_p = label_log_probs(decoder, state, given, rows=4)[row]
        assert log_p.tolist() == pytest.approx([label.log_p for label in labels], abs=1e-9)


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_labels_in_portions_are_the_same(rows: int) -> None:
    decoder = make("llama")
    state = read(decoder, 2)
    search = Search(decoder, state, SEPARATOR, ROOM)
    for whole, parts in zip(
        search.one_shot(K, rows=K),
        search.one_shot(K, rows=rows),
        strict=True,
    ):
        assert_equal(parts, whole, 1e-9)


def test_every_token_can_begin_a_label_but_the_separator() -> None:
    decoder = make("gpt2")
    state = read(decoder, 1)
    (found,) = Search(decoder, state, SEPARATOR, room=2).one_shot(VOCABULARY - 1, rows=7)
    ended = [
        token
        for token in range(VOCABULARY)
        if token != SEPARATOR and slow(decoder, images(), token, 2) is not None
    ]
    assert sorted(label.ids[0] for label in found) == ended
    for section, key in (({"first_tokens": VOCABULARY}, "first_tokens"),
                         ({"num_labels": VOCABULARY}, "num_labels")):  # fmt: skip
        with pytest.raises(UserError, match=rf"{VOCABULARY} is more than the 39 tokens") as error:
            check(Generate(method="one_shot", **section), VOCABULARY)
        assert error.value.key == f"generate.{key}"
    check(Generate(method="one_shot", first_tokens=VOCABULARY - 1), VOCABULARY)


def test_one_label_after_another_is_the_same_without_nxtps_rule() -> None:
    decoder = make("llama")
    state = read(decoder, 3)
    found = Search(decoder, state, SEPARATOR, ROOM).greedy(K, nxtp=False, per_label=True)
    once = Search(decoder, state, SEPARATOR, ROOM).one_shot(K, rows=K)
    for got, want in zip(found, once, strict=True):
        assert_equal(got, want, 1e-9)


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("per_label", [False, True])
def test_by_nxtps_rule_a_label_follows_the_separator(family: str, per_label: bool) -> None:
    decoder = make(family)
    search = Search(decoder, read(decoder, 3), SEPARATOR, ROOM)
    found = search.greedy(3, nxtp=True, per_label=per_label)
    ended = [(row, labels) for row, labels in enumerate(found) if len(labels) == 3]
    assert ended
    for row, got in ended:
        said: list[list[int]] = []
        taken: set[int] = set()
        for label in got:
            # the text so far with a label to come: its first token is told by what it begins with
            text = lay_out(PROMPT, [*said, [5, 6]], nxtp=True, per_label=per_label)
            hidden = decoder.label_hidden(images(3)[row : row + 1], stack([text], 0))[0]
            following = decoder.log_probs(hidden[text.source[-1]])
            following[[*taken, SEPARATOR]] = -torch.inf
            first = int(following.argmax())
            assert label.ids[0] == first
            log_p = float(following[first])
            whole = [*label.ids, SEPARATOR]
            text = lay_out(PROMPT, [*said, whole, [5, 6]], nxtp=True, per_label=per_label)
            hidden = decoder.label_hidden(images(3)[row : row + 1], stack([text], 0))[0]
            places = [p for p, segment in enumerate(text.segment) if segment == len(said) + 1]
            for place in places[1:]:
                following = decoder.log_probs(hidden[place - 1])
                assert int(following.argmax()) == text.ids[place]
                log_p += float(following[text.ids[place]])
            assert label.log_p == pytest.approx(log_p, abs=1e-9)
            taken.add(first)
            said.append(whole)


def test_beams_as_many_as_tokens_find_the_likeliest_labels_of_all() -> None:
    decoder = make("gpt2")
    state = read(decoder, 2)
    tokens = [token for token in range(VOCABULARY) if token != SEPARATOR]
    every = [(a, SEPARATOR) for a in tokens]
    every += [(*pair, SEPARATOR) for pair in itertools.product(tokens, tokens)]
    log_p_BK = label_log_probs(decoder, state, every, rows=400)
    search = Search(decoder, state, SEPARATOR, room=3)
    found = search.beam(num_beams=VOCABULARY - 1, num_labels=9)
    for got, log_p_K in zip(found, log_p_BK, strict=True):
        best = log_p_K.topk(9)
        want = [Found(every[i][:-1], float(log_p_K[i])) for i in best.indices]
        assert_equal(got, want, 1e-9)


def test_one_beam_is_the_likeliest_text() -> None:
    decoder = make("llama")
    search = Search(decoder, read(decoder, 3), SEPARATOR, ROOM)
    found = search.beam(num_beams=1, num_labels=1)
    for row, got in enumerate(found):
        want = slow_one_shot(decoder, images(3)[row : row + 1], 1)
        if want:
            assert got[0].log_p >= want[0].log_p - 1e-9


@pytest.mark.parametrize("top_p", [1.0, 0.6])
def test_drawn_labels_are_those_of_their_numbers(top_p: float) -> None:
    """Token by token the inverse of the cumulated probabilities, read anew at each."""
    decoder, temperature = make("llama"), 1.3
    state = read(decoder, 2)
    uniform = uniforms(3, range(2), 8, ROOM).view(2, 8, ROOM)
    found = Search(decoder, state, SEPARATOR, ROOM).sample(
        uniform, rows=3, temperature=temperature, top_k=0, top_p=top_p
    )
    for row in range(2):
        image = images(2)[row : row + 1]
        wanted: dict[tuple[int, ...], float] = {}
        for numbers in uniform[row].tolist():
            label: list[int] = []
            log_p = 0.0
            for number in numbers:
                log_p_V = next_log_p(decoder, image, label)
                scores = log_p_V.clone()
                if not label:
                    scores[SEPARATOR] = -torch.inf
                p_V = (scores / temperature).softmax(0)
                order = p_V.argsort(descending=True)
                kept, mass = [], 0.0
                for token in order.tolist():  # the fewest tokens that hold top_p
                    kept.append(token)
                    mass += float(p_V[token])
                    if mass >= top_p:
                        break
                place, at = 0.0, None
                for token in sorted(kept):
                    place += float(p_V[token]) / mass
                    if number < place:
                        at = token
                        break
                at = max(kept) if at is None else at
                log_p += float(log_p_V[at])
                if at == SEPARATOR:
                    wanted[tuple(label)] = log_p
                    break
                label.append(at)
        got = {label.ids: label.log_p for label in found[row]}
        assert got.keys() == wanted.keys() and len(got) == len(found[row])
        assert got == pytest.approx(wanted, abs=1e-8)
