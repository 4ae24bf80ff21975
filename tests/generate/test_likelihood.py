"""Answers generated and weighed through a task, against the decoder on one row at a time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from engine.config.schema import Generate
from engine.data.text.templates import template
from engine.errors import UserError
from engine.generate import likelihood
from engine.generate.likelihood import batch_likelihoods, log_likelihoods
from engine.generate.texts import generate_batch, generate_texts
from engine.types import Sample
from tests.tasks import test_caption
from tests.tasks.test_vqa import DECODERS, make_model, make_task, samples

COUNTS = [2, 0, 1, 1]
TARGETS = [["yes", "no", "a long answer"], ["3"], ["no", "yes"], ["", "yes"]]


def lively(model):
    """Weights large enough that texts differ."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    return model.eval()


def one_by_one(task, model, chosen: list[Sample], targets) -> torch.Tensor:
    """−nll of each (sample, target) as a batch of training's would have it."""
    found = []
    for sample, given in zip(chosen, targets, strict=True):
        (_, question), _ = sample.row.turns
        for text in given:
            row = replace(sample.row, turns=(("human", question), ("gpt", text)))
            found.append(-model(task.batch([replace(sample, row=row)]))["nll_B"])
    return torch.cat(found)


@pytest.mark.parametrize("rows", [1, 3, 1024])
@pytest.mark.parametrize("name", DECODERS)
def test_likelihoods_equal_losses_one_by_one(name: str, rows: int, monkeypatch) -> None:
    monkeypatch.setattr(likelihood, "_MOST_ROWS", rows)
    task = make_task(name)
    model = lively(make_model(task))
    chosen = samples(COUNTS)
    want = one_by_one(task, model, chosen, TARGETS)
    got = batch_likelihoods(task, model, task.prompt_batch(chosen), TARGETS)
    torch.testing.assert_close(got.log_p_R, want, rtol=1e-9, atol=1e-9)
    assert got.tokens_R.tolist() == [len(t) + 1 for given in TARGETS for t in given]  # bytes, end
    with torch.no_grad():
        tokens = model.image_tokens(torch.stack([i for s in chosen for i in images(s)]))
        asked = [sample.row.turns[0][1] for sample in chosen]
        again = log_likelihoods(task, model, tokens, asked, TARGETS, num_images=COUNTS)
        other = log_likelihoods(
            task, model, tokens, asked, TARGETS, num_images=COUNTS,
            template=template("Q: {question} A: ", key="k"),
        )  # fmt: skip
    torch.testing.assert_close(again.log_p_R, want.detach(), rtol=1e-9, atol=1e-9)
    assert (other.log_p_R - want).abs().min() > 1e-6
    alone = log_likelihoods(task, model, tokens[2:3], asked[2:3], TARGETS[2:3])
    torch.testing.assert_close(alone.log_p_R, want[4:6], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", DECODERS)
def test_what_is_known_of_prompts_is_not_laid_out_for_all_answers_at_once(name, monkeypatch):
    task = make_task(name)
    model = lively(make_model(task))
    batch = task.prompt_batch(samples(COUNTS))
    whole = batch_likelihoods(task, model, batch, TARGETS)
    known = model.decoder.prefill(model.decoder_input(batch))
    given = known.states_BSD if name == "t5" else known.state.cache.layers[0].keys
    layers = 1 if name == "t5" else len(known.state.cache.layers)
    assert known.row_bytes == 2 * layers * given[0].numel() * 8
    sizes = []
    weigh = model.decoder.nll_after
    monkeypatch.setattr(model.decoder, "nll_after", lambda *a: sizes.append(len(a[1])) or weigh(*a))
    monkeypatch.setattr(likelihood, "_MOST_BYTES", 3 * known.row_bytes)
    found = batch_likelihoods(task, model, batch, TARGETS)
    assert sizes == [3, 3, 2]
    torch.testing.assert_close(found.log_p_R, whole.log_p_R, rtol=1e-9, atol=1e-9)
    monkeypatch.setattr(likelihood, "_MOST_BYTES", 1)
    sizes.clear()
    batch_likelihoods(task, model, batch, TARGETS)
    assert sizes == [1] * 8


def test_an_answer_is_made_into_tokens_once(monkeypatch) -> None:
    task = make_task("t5")
    asked, ids = [], task.answer_ids
    monkeypatch.setattr(task, "answer_ids", lambda text: asked.append(text) or ids(text))
    batch_likelihoods(task, make_model(task), task.prompt_batch(samples(COUNTS)), [["a", "b"]] * 4)
    assert asked == ["a", "b"]


@pytest.mark.parametrize("name", DECODERS)
def test_a_model_in_bf16_weighs_answers_by_logits_in_fp32(name: str) -> None:
    model = make_model(make_task(name)).bfloat16()
    decoder, width = model.decoder, model.decoder.head()[0].shape[1]
    hidden = 8 * torch.randn(64, 1, width, dtype=torch.bfloat16)
    labels = torch.randint(0, 50, (64, 1))
    logits = hidden[:, 0].double() @ decoder.head()[0].double().T
    want = torch.nn.functional.cross_entropy(logits, labels[:, 0], reduction="none")
    torch.testing.assert_close(
        decoder.answer_losses(hidden, labels).double(), want, rtol=1e-5, atol=1e-5
    )


def images(sample: Sample) -> list[torch.Tensor]:
    return list(sample.images)


@pytest.mark.parametrize("name", DECODERS)
def test_gradients_reach_the_images(name: str) -> None:
    task = make_task(name)
    model = lively(make_model(task))
    pixels = torch.randn(2, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    chosen = samples([1, 1])
    training = task.batch(chosen) | {"image_BCHW": pixels}
    (want,) = torch.autograd.grad(-model(training)["nll_B"].sum(), pixels)
    pairs = [[text for _, text in sample.row.turns] for sample in chosen]
    asked, answers = zip(*pairs, strict=True)
    tokens = model.image_tokens(pixels)
    found = log_likelihoods(task, model, tokens, asked, [[answer] for answer in answers])
    (got,) = torch.autograd.grad(found.log_p_R.sum(), pixels)
    torch.testing.assert_close(got, want)
    assert want.abs().min() > 0


@pytest.mark.parametrize("method", ["greedy", "beam", "sample"])
@pytest.mark.parametrize("name", DECODERS)
def test_a_rows_answer_does_not_hang_on_the_others(name: str, method: str) -> None:
    task = make_task(name, max_length=30)
    model = lively(make_model(task))
    section = Generate(method=method, num_beams=2, max_new_tokens=4, temperature=0.7)
    chosen = samples(COUNTS)
    texts = generate_batch(task, model, task.prompt_batch(chosen), section)
    assert len(texts) == len(COUNTS) and all(len(several) == 1 for several in texts)
    assert len({several[0] for several in texts}) > 1
    for row, sample in enumerate(chosen):
        alone = generate_batch(task, model, task.prompt_batch([sample]), section)
        assert alone == texts[row : row + 1], row
    two = torch.stack([chosen[2].images[0], chosen[3].images[0]])
    asked = [chosen[2].row.turns[0][1], chosen[3].row.turns[0][1]]
    assert generate_texts(task, model, two, asked, section, rows=[2, 3]) == texts[2:]


def test_a_prompt_that_leaves_no_room_is_told() -> None:
    task = make_task("causal", max_length=8)
    model = make_model(task)
    with pytest.raises(UserError, match="the prompt takes 9 of 8 tokens"):
        generate_texts(
            task, model, torch.zeros(1, 3, 2, 2, dtype=torch.uint8), ["hello?"], Generate()
        )


def test_a_decoder_that_cannot_weigh_answers_is_told() -> None:
    task = test_caption.make_task("t5_cross")
    model = test_caption.make_model(task)
    with pytest.raises(UserError, match="a T5CrossDecoder cannot weigh answers; take t5 or causal"):
        log_likelihoods(make_task(), model, torch.zeros(1, 4, 16).double(), ["q"], [["a"]])
