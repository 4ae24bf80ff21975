"""Causal decoders with several images or none before a text, against rows one by one."""

import pytest
import torch
import torch.nn.functional as F

from engine.losses.language_model import IGNORED
from engine.models.decoders.language_model import DecoderInput
from tests.models.decoders.nll import nll
from tests.models.decoders.test_decoders import FAMILIES, VOCABULARY, WIDTH, make

CAUSAL = [family for family in FAMILIES if family != "t5_cross"]
TOKENS = 3  # of an image
COUNTS = [1, 0, 3, 2]
LENGTHS = [5, 7, 3, 6]
CLOSE = {"rtol": 1e-9, "atol": 1e-9}
CLOSE_BY = {  # norms and softmax of these are in fp32, whatever the weights are
    family: {"rtol": 2e-6, "atol": 2e-6} if family in ("llama", "mpt") else CLOSE
    for family in CAUSAL
}


def make_rows(counts=COUNTS):
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(sum(counts), TOKENS, WIDTH, generator=generator, dtype=torch.float64)
    rows = [torch.randint(3, VOCABULARY, (n,), generator=generator) for n in LENGTHS]
    return image.requires_grad_(), rows[: len(counts)]


def padded(rows, value=0, *, left=False):
    side = "left" if left else "right"
    pad = torch.nn.utils.rnn.pad_sequence
    ids = pad(list(rows), batch_first=True, padding_value=value, padding_side=side)
    mask = pad([torch.ones_like(row) for row in rows], batch_first=True, padding_side=side)
    return ids, mask


def whole(model, image_ND, text_T):
    """Logits [T, V] of a text behind image tokens: the model itself, one row, GIT's mask."""
    embeds = torch.cat([image_ND, model.get_input_embeddings()(text_T)])[None]
    n, length = len(image_ND), embeds.shape[1]
    sees = torch.ones(length, length).tril().bool()
    sees[:n, :n] = True
    mask = torch.zeros(1, 1, length, length, dtype=torch.float64)
    mask.masked_fill_(~sees, torch.finfo(torch.float64).min)
    return embeds, mask


@pytest.mark.parametrize("family", CAUSAL)
def test_losses_and_gradients_equal_rows_alone(family: str) -> None:
    decoder = make(family)
    image, rows = make_rows()
    ids, mask = padded([row[:-1] for row in rows])
    labels, _ = padded([row[1:] for row in rows], IGNORED)
    got = nll(decoder, image, ids, mask, labels, torch.tensor(COUNTS))
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    (slope,) = torch.autograd.grad((weights * got).sum(), image)
    total, start = torch.zeros((), dtype=torch.float64), 0
    for row, count in enumerate(COUNTS):
        own = image[start : start + count].reshape(1, count * TOKENS, WIDTH)
        start += count
        text, answer = rows[row][None, :-1], rows[row][None, 1:]
        hidden = decoder.hidden(
            DecoderInput(own, text, torch.ones_like(text))
        )  # as one image of more tokens
        weight, bias = decoder.head()
        alone = F.cross_entropy(F.linear(hidden, weight, bias)[0], answer[0], reduction="sum")
        torch.testing.assert_close(got[row], alone, **CLOSE_BY[family])
        total = total + weights[row] * alone
    (want,) = torch.autograd.grad(total, image)
    torch.testing.assert_close(slope, want, **CLOSE_BY[family])


@pytest.mark.parametrize("family", ["llama", "mpt"])
def test_a_row_alone_equals_the_model_itself(family: str) -> None:
    """Positions that are computed count images and text alike, as the model does unhelped."""
    decoder = make(family)
    image, rows = make_rows()
    text = rows[3]
    embeds, mask = whole(decoder.model, image[4:].flatten(0, 1), text)
    want = decoder.model.get_decoder()(inputs_embeds=embeds, attention_mask=mask, use_cache=False)
    got = decoder.hidden(
        DecoderInput(image[4:], text[None], torch.ones_like(text[None]), torch.tensor([2]))
    )
    torch.testing.assert_close(got, want.last_hidden_state[:, 2 * TOKENS :])


@pytest.mark.parametrize("family", CAUSAL)
def test_a_batch_of_texts_alone_is_a_language_model(family: str) -> None:
    decoder = make(family)
    image, rows = make_rows([0, 0])
    ids, mask = padded(rows)
    labels = ids.masked_fill(mask == 0, IGNORED).roll(-1, 1)
    labels[:, -1] = IGNORED
    got = nll(decoder, image, ids, mask, labels, torch.tensor([0, 0]))
    for row, text in enumerate(rows):
        logits = decoder.model(text[None]).logits[0, :-1]
        want = F.cross_entropy(logits, text[1:], reduction="sum")
        torch.testing.assert_close(got[row], want, **CLOSE_BY[family])
    got.sum().backward()
    assert image.grad is not None and image.grad.shape == (0, TOKENS, WIDTH)


@pytest.mark.parametrize("family", CAUSAL)
def test_greedy_over_a_cache_equals_full_recomputing(family: str) -> None:
    decoder = make(family)
    image, rows = make_rows()
    prompt, mask = padded(rows, left=True)
    counts = torch.tensor(COUNTS)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    got = decoder.generate(DecoderInput(image, prompt, mask, counts), **options)
    weight, bias = decoder.head()
    start = 0
    for row, count in enumerate(COUNTS):
        own = image[start : start + count].reshape(1, count * TOKENS, WIDTH)
        start += count
        text = rows[row][None]
        for _ in range(4):
            last = decoder.hidden(DecoderInput(own, text, torch.ones_like(text)))[:, -1]
            text = torch.cat([text, F.linear(last, weight, bias).argmax(-1)[None]], dim=1)
        assert got[row].tolist() == text[0, -4:].tolist(), (family, row)
    beams = decoder.generate(
        DecoderInput(image, prompt, mask, counts), **options | {"num_beams": 2}
    )
    alone = decoder.generate(
        DecoderInput(image[4:], prompt[3:, 1:], mask[3:, 1:], counts[3:]),
        **options | {"num_beams": 2},
    )
    assert beams[3].tolist() == alone[0].tolist()


@pytest.mark.parametrize("family", CAUSAL)
def test_answers_weighed_behind_a_cache_equal_whole_texts(family: str) -> None:
    decoder = make(family)
    image, rows = make_rows()
    prompt, mask = padded(rows, left=True)
    known = decoder.prefill(DecoderInput(image, prompt, mask, torch.tensor(COUNTS)))
    owners = torch.tensor([3, 0, 0, 1, 2, 3])
    answers = [torch.tensor(a) for a in ([4, 5, 1], [1], [6, 7, 8, 1], [9, 1], [3, 1], [10, 1])]
    labels, _ = padded(answers, IGNORED)
    got = decoder.nll_after(known, owners, labels)
    again = decoder.nll_after(known, owners, labels)  # the cache is as it was
    assert torch.equal(got, again)
    (slope,) = torch.autograd.grad(got.sum(), image)
    firsts = torch.tensor(COUNTS).cumsum(0) - torch.tensor(COUNTS)
    want = []
    for owner, answer in zip(owners.tolist(), answers, strict=True):
        own = image[firsts[owner] : firsts[owner] + COUNTS[owner]]
        text = torch.cat([rows[owner], answer])
        labels_T = torch.cat([torch.full((len(rows[owner]) - 1,), IGNORED), answer])
        whole_text = text[None, :-1]
        want.append(
            nll(
                decoder, own, whole_text, torch.ones_like(whole_text), labels_T[None],
                torch.tensor([COUNTS[owner]]),
            )
        )  # fmt: skip
    torch.testing.assert_close(got, torch.cat(want), **CLOSE_BY[family])
    (expected,) = torch.autograd.grad(torch.cat(want).sum(), image)
    torch.testing.assert_close(slope, expected, **CLOSE_BY[family])
