"""Sampling by the image's own numbers: the right frequencies, and the same texts in any batch."""

import math

import pytest
import torch
import transformers

from engine.generate.texts import Draw, processors, uniforms
from engine.models.decoders.language_model import DecoderInput
from tests.generate import speaker

VOCABULARY, DRAWS = 50, 40_000
BENT = {"temperature": 1.7, "top_k": 12, "top_p": 0.9}
PLAIN = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}


def scores():
    """Of one row: a few likely tokens, many unlikely ones."""
    return 3 * torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(0))


def warped(options):
    """The distribution that transformers samples from."""
    bent = scores()
    for warper in (
        transformers.TemperatureLogitsWarper(options["temperature"]),
        transformers.TopKLogitsWarper(options["top_k"] or VOCABULARY),
        transformers.TopPLogitsWarper(options["top_p"]),
    ):
        bent = warper(None, bent)
    return bent.double().softmax(-1)[0]


def drawn(uniform_BT, options=PLAIN):
    given = scores().expand(len(uniform_BT), -1)
    only = processors(uniform_BT, **options)(None, given)
    assert only.isfinite().sum(1).eq(1).all() and only.max() == 0
    return only.argmax(1)


def chi_square(tokens, p_V):
    """Pearson's statistic over tokens expected at least 5 times, in standard deviations."""
    expected = p_V * len(tokens)
    common = expected >= 5
    seen = torch.bincount(tokens, minlength=len(p_V))
    statistic = ((seen - expected).square() / expected)[common].sum()
    freedom = int(common.sum()) - 1
    return float((statistic - freedom) / math.sqrt(2 * freedom))


@pytest.mark.parametrize("options", [PLAIN, BENT], ids=["plain", "bent"])
@pytest.mark.parametrize("over", ["rows", "texts", "tokens", "seeds"])
def test_tokens_come_as_often_as_they_are_likely(over, options):
    uniform = {
        "rows": lambda: uniforms(3, range(DRAWS), 1, 1),
        "texts": lambda: uniforms(3, [5], DRAWS, 1),
        "tokens": lambda: uniforms(3, [5], 1, DRAWS).T,
        "seeds": lambda: torch.cat([uniforms(seed, [5], 1, 1) for seed in range(DRAWS)]),
    }[over]()
    tokens, p_V = drawn(uniform, options), warped(options)
    assert abs(chi_square(tokens, p_V)) < 4
    assert p_V[tokens].min() > 0  # nothing that top-k and top-p have struck out
    assert abs(chi_square(tokens, p_V.roll(1))) > 100


def test_a_texts_numbers_hang_on_seed_row_and_text_alone():
    whole = uniforms(1, [4, 9, 2], 3, 7).view(3, 3, 7)
    assert torch.equal(uniforms(1, [9], 2, 5), whole[1, :2, :5])
    assert len(whole.unique()) == whole.numel()
    assert not torch.isin(uniforms(2, [9], 3, 7), whole).any()


@pytest.mark.parametrize("u", [0.0, 0.5, 1 - 2**-53])
def test_the_ends_fall_on_tokens_that_are_possible(u):
    score = torch.tensor([[-torch.inf, 0.0, -torch.inf, 30.0, -torch.inf, -torch.inf]])
    only = Draw(torch.tensor([[u]], dtype=torch.float64))(None, score)
    assert only.argmax().item() == (1 if u == 0 else 3)
    broken = Draw(torch.tensor([[u]], dtype=torch.float64))(None, torch.full((1, 6), torch.nan))
    assert broken.isfinite().sum() == 1


@pytest.mark.parametrize(("name", "temperature"), [("causal", 0.2), ("t5_cross", 2.0)])
@torch.no_grad()
def test_through_generate_frequencies_are_the_models_own(name, temperature):
    """Of the first token of many texts of one image, and of the second after the commonest."""
    task, model = speaker.speaker(name)
    number, bent = 3000, PLAIN | {"temperature": temperature}
    image_BND = model.image_tokens(20 * torch.arange(12, dtype=torch.uint8).view(1, 3, 2, 2))
    ids, mask = task.prompts(["a"])
    found = model.decoder.generate(
        DecoderInput(image_BND, ids, mask),
        max_new_tokens=2,
        do_sample=True,
        num_return_sequences=number,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        pad_token_id=task.tokenizer.pad_id,
        eos_token_id=task.eos_id,
        logits_processor=processors(uniforms(0, [0], number, 2), **bent),
    )

    def following(ids_1T):
        hidden = model.decoder.hidden(DecoderInput(image_BND, ids_1T, torch.ones_like(ids_1T)))[
            :, -1
        ]
        return (hidden @ model.decoder.head()[0].T / temperature).softmax(-1)[0]

    assert abs(chi_square(found[:, 0], following(ids))) < 4
    first = found[:, 0].mode().values
    rest = found[found[:, 0] == first, 1]
    assert len(rest) > 100
    assert abs(chi_square(rest, following(torch.cat([ids, first.view(1, 1)], dim=1)))) < 4
