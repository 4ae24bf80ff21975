"""VQAScore against loops over pairs, finite differences, and its command line."""

import math
import time

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from engine.data.text.templates import template as find_template
from engine.errors import UserError
from engine.evals import vqa_score
from engine.evals.vqa_score import VQAScore
from engine.models.decoders.language_model import DecoderInput
from engine.types import BadSample
from tests.evals import answering

TEXTS = ["a dog", "two red cats on a mat", "x", "", 'a "{}" and {brackets}', "é 🙂"]


def by_loop(task, model, images, texts, question, answer, template=None):
    """exp(−mean cross-entropy) of the answer and its end, pair by pair, without any cache."""
    scores = torch.empty(len(images), len(texts), dtype=torch.float64)
    for i, image in enumerate(images):
        for j, text in enumerate(texts):
            tokens = model.image_tokens(((255 * image - model.mean_C11) / model.std_C11)[None])
            asked, reply = (text.join(each.split("{}")) for each in (question, answer))
            ids, mask = task.prompts([asked], template=template)
            said = torch.tensor([task.answer_ids(reply)])
            decoder = model.decoder
            if task.encodes_prompt:
                known = decoder.prefill(DecoderInput(tokens, ids, mask))
                start = torch.full((1, 1), decoder.start_id)
                logits = decoder.model(
                    encoder_outputs=(known.states_BSD,), attention_mask=known.mask_BS,
                    decoder_input_ids=torch.cat([start, said[:, :-1]], 1),
                ).logits[0]  # fmt: skip
            else:
                whole = torch.cat([ids, said[:, :-1]], 1)
                hidden = decoder.hidden(DecoderInput(tokens, whole, torch.ones_like(whole)))
                weight, bias = decoder.head()
                logits = F.linear(hidden, weight, bias)[0, ids.shape[1] - 1 :]
            scores[i, j] = math.exp(-F.cross_entropy(logits, said[0]).item())
    return scores


@pytest.mark.parametrize("decoder", ["t5", "causal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scores_equal_a_loop_over_pairs(decoder, dtype):
    task, model = answering.make(decoder, dtype=dtype)
    images = answering.noise(3, dtype=dtype)
    with torch.no_grad():
        wanted = by_loop(task, model, images, TEXTS, vqa_score.QUESTION, "Yes")
    tolerance = {"rtol": 1e-5 if dtype == torch.float32 else 1e-10, "atol": 0}
    assert wanted.std(0).min() / wanted.mean() > 1e-4  # the image is looked at
    for size in (1, 4, 64):
        score = VQAScore(model, task, batch_size=size)
        model.image_encoder.seen = 0
        found = score(images, TEXTS)
        assert model.image_encoder.seen == 3
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), wanted, **tolerance)
    torch.testing.assert_close(score(list(images), TEXTS[:1]).double(), wanted[:, :1], **tolerance)


@pytest.mark.parametrize(("question", "answer"), [("", "{}"), ("Is it {}?", "It is {}.")])
def test_the_text_may_stand_in_the_answer(question, answer):
    task, model = answering.make()
    images = answering.noise(2)
    with torch.no_grad():
        wanted = by_loop(task, model, images, TEXTS, question, answer)
    for size in (3, 64):
        score = VQAScore(model, task, question=question, answer=answer, batch_size=size)
        torch.testing.assert_close(score(images, TEXTS), wanted, rtol=1e-10, atol=0)


def test_another_question_answer_and_template():
    task, model = answering.make()
    images, question = answering.noise(2), "Is it {}?"
    score = VQAScore(model, task, question=question, answer="it is", template="t5_v1")
    v1 = find_template("t5_v1", key="")
    with torch.no_grad():
        wanted = by_loop(task, model, images, TEXTS, question, "it is", v1)
        plain = by_loop(task, model, images, TEXTS, question, "it is")
    torch.testing.assert_close(score(images, TEXTS), wanted, rtol=1e-10, atol=0)
    assert not torch.allclose(plain, wanted, rtol=1e-3)


def test_yes_against_no():
    task, model = answering.make()
    images = answering.noise(2)
    p = [VQAScore(model, task, answer=a)(images, TEXTS) for a in ("Yes", "No")]
    # e^(mean log p · tokens): each answer's probability, its end included
    whole = [each ** len(task.answer_ids(a)) for each, a in zip(p, ("Yes", "No"), strict=True)]
    found = VQAScore(model, task, against="No")(images, TEXTS)
    torch.testing.assert_close(found, whole[0] / (whole[0] + whole[1]), rtol=1e-9, atol=0)
    other = VQAScore(model, task, answer="No", against="Yes")(images, TEXTS)
    torch.testing.assert_close(found + other, torch.ones_like(found))


def norm_in_fp64(self, hidden):
    """T5's norm, which transformers computes in fp32 whatever comes in."""
    mean = hidden.pow(2).mean(-1, keepdim=True)
    return self.weight * hidden * torch.rsqrt(mean + self.variance_epsilon)


@pytest.mark.parametrize("decoder", ["t5", "causal"])
def test_gradients_reach_the_pixels(decoder, monkeypatch):
    task, model = answering.make(decoder)
    for kind in {type(module) for module in model.modules()}:
        if kind.__name__ == "T5LayerNorm":
            monkeypatch.setattr(kind, "forward", norm_in_fp64)
    model.requires_grad_(False)
    score = VQAScore(model, task, batch_size=3)
    images = answering.noise(2).requires_grad_()
    total = score(images, TEXTS[:2], grad=True).log().sum()
    (gradient,) = torch.autograd.grad(total, images)
    step, generator = 1e-6, torch.Generator().manual_seed(1)
    for _ in range(3):
        way = torch.randn(images.shape, generator=generator, dtype=images.dtype)
        ends = [score(images.detach() + s * way, TEXTS[:2]).log().sum() for s in (step, -step)]
        wanted = float(ends[0] - ends[1]) / (2 * step)
        assert float((gradient * way).sum()) == pytest.approx(wanted, rel=1e-5, abs=1e-9)
    assert not score(images, TEXTS[:2]).requires_grad
    assert model.training is False


def test_a_reward_rises_by_following_its_gradient():
    task, model = answering.make()
    score = VQAScore(model.requires_grad_(False), task)
    image = (
        answering.noise(1)[0, :, :7, :9].clone().requires_grad_()
    )  # stretched to the model's size
    before = score.pairs([image], ["a dog"], grad=True)
    before.log().backward()
    moved = (image + 1e-3 * image.grad / image.grad.norm()).detach()
    assert score.pairs([moved], ["a dog"]) > before
    assert image.grad.shape == (3, 7, 9)


def pictures(tmp_path, count=3):
    generator = torch.Generator().manual_seed(5)
    found = []
    for number in range(count):
        pixels = torch.randint(256, (16, 16, 3), dtype=torch.uint8, generator=generator)
        found.append(tmp_path / f"{number}.png")
        Image.fromarray(pixels.numpy()).save(found[-1])
    return found


def test_all_forms_of_an_image_score_alike(tmp_path):
    task, model = answering.make()
    score = VQAScore(model, task)
    (path,) = pictures(tmp_path, 1)
    image = Image.open(path)
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(16, 16, 3)
    chw = pixels.permute(2, 0, 1).contiguous()
    forms = [path, str(path), path.read_bytes(), image, chw, chw.double() / 255]
    found = score(forms, TEXTS)
    torch.testing.assert_close(found, found[:1].expand_as(found), rtol=1e-12, atol=0)


def test_pairs_encode_each_image_once_and_leave_out_bad_ones(tmp_path):
    task, model = answering.make()
    score = VQAScore(model, task, batch_size=2)
    paths = pictures(tmp_path)
    wanted = score(paths, TEXTS)
    asked = [(2, 0), (0, 1), (2, 2), (1, 3), (0, 0), (2, 5)]
    images = [str(paths[i]) for i, _ in asked]
    texts = [TEXTS[j] for _, j in asked]
    model.image_encoder.seen = 0
    found = score.pairs(images, texts)
    assert model.image_encoder.seen == 3
    torch.testing.assert_close(found, torch.stack([wanted[i, j] for i, j in asked]))
    told = []
    missing = [str(tmp_path / "no.png"), *images]
    found = score.pairs(missing, ["a", *texts], bad=lambda image, error: told.append(error.cause))
    assert told == ["missing"]
    assert found.isnan().tolist() == [True] + [False] * 6
    assert score.pairs(missing[:1], ["a"], bad=lambda *_: None).isnan().all()
    with pytest.raises(BadSample, match="missing"):
        score.pairs(missing, ["a", *texts])


@pytest.mark.parametrize(
    ("text", "told"),
    [("long " * 100, "prompt too long: .*'long "), ("<image> <image>", "image count: 2")],
)
@pytest.mark.parametrize("decoder", ["t5", "causal"])
def test_texts_that_cannot_be_asked_about(decoder, text, told, tmp_path):
    task, model = answering.make(decoder)
    score, paths = VQAScore(model, task, batch_size=2), pictures(tmp_path)
    model.image_encoder.seen = 0
    with pytest.raises(BadSample, match=told):
        score(paths[:1], ["a", text])
    with pytest.raises(BadSample, match=told):
        score.pairs(paths, [text, "a", "b"])
    assert model.image_encoder.seen == 0  # named before anything is scored
    bad = {}
    found = score.pairs(
        paths, ["a", text, "b"], bad=lambda thing, error: bad.update({thing: error.cause})
    )
    assert bad == {text: told.partition(":")[0]}
    assert found.isnan().tolist() == [False, True, False]
    torch.testing.assert_close(found[[0, 2]], score.pairs([paths[0], paths[2]], ["a", "b"]))


def test_the_limit_is_one_of_tokens(tmp_path, monkeypatch):
    """Of which a short text may have more than a long one."""
    task, model = answering.make()
    raw = task.tokenizer.raw
    monkeypatch.setattr(task.tokenizer, "raw", lambda text: raw(text.replace("ŋ", "long " * 100)))
    with pytest.raises(BadSample, match=r"prompt too long: .*ŋ"):
        VQAScore(model, task)(pictures(tmp_path)[:1], ["a longer text", "ŋ"])


def test_pairs_may_be_stopped(tmp_path):
    task, model = answering.make()
    score, paths = VQAScore(model, task, batch_size=1), pictures(tmp_path)
    asked = iter([False, False, True])
    found = score.pairs(paths, ["a", "b", "c"], stopped=lambda: next(asked))
    assert found.isnan().tolist() == [False, False, True]


def test_a_dataset_in_one_go(tmp_path):
    task, model = answering.make()
    score = VQAScore(model, task)
    paths = pictures(tmp_path)
    samples = [{"images": paths[i : i + 2], "texts": TEXTS[i : i + 3]} for i in (0, 1)]
    found = score.batch(samples)
    assert found.shape == (2, 2, 3)
    for sample, own in zip(samples, found, strict=True):
        torch.testing.assert_close(own, score(sample["images"], sample["texts"]))
    with pytest.raises(ValueError, match="as many"):
        score.batch([*samples, {"images": paths, "texts": TEXTS}])


def test_many_texts_at_once_are_faster_than_one_by_one():
    task, model = answering.make(dtype=torch.float32)
    score, images = VQAScore(model, task, batch_size=128), answering.noise(8, dtype=torch.float32)
    texts = [f"a {n} dog" for n in range(32)]
    score(images, texts[:1])
    start = time.process_time()
    whole = score(images, texts)
    batched = time.process_time() - start
    start = time.process_time()
    some = [score(images[i : i + 1], texts[j : j + 1]) for i in range(4) for j in range(8)]
    alone = (time.process_time() - start) * len(images) * len(texts) / len(some)
    assert alone > 4 * batched
    torch.testing.assert_close(torch.cat(some).view(4, 8), whole[:4, :8], rtol=1e-4, atol=1e-9)


def test_what_cannot_be_asked(tmp_path):
    task, model = answering.make("causal")
    for wrong in ({"question": "Is it?"}, {"question": "{} or {}?"}, {"answer": "{} {}"}):
        with pytest.raises(UserError, match=r"question or the answer must have \{\} in it, once"):
            VQAScore(model, task, **wrong)
    with pytest.raises(ValueError, match="needs the task"):
        VQAScore(model)
    with pytest.raises(UserError, match="no prompt template is called 't5_v9'"):
        VQAScore(model, task, template="t5_v9")
    with pytest.raises(UserError, match="does not exist"):
        VQAScore(tmp_path / "run")
    score = VQAScore(model, task)
    for images, texts in ((answering.noise(1), []), ([], ["x"])):
        with pytest.raises(ValueError, match="no scores"):
            score(images, texts)
