"""Captions of a source: the same by any number of ranks and in any batch, and scored right."""

import io
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("pycocoevalcap")

from engine.config.schema import Config, Generate
from engine.data.transforms.pipeline import to_tensor
from engine.errors import FaultError
from engine.evals import captions
from engine.evals.predict import Predictor
from engine.metrics import captions as scoring
from engine.metrics.captions import JavaError
from engine.run import Run
from engine.types import Row, Source
from tests import distributed
from tests.generate.speaker import speaker

CPU = torch.device("cpu")
METHODS = {
    "greedy": {"method": "greedy"},
    "beam": {"method": "beam", "num_beams": 3},
    "sample": {"method": "sample", "temperature": 0.5},
    "best_of_n": {"method": "best_of_n", "num_samples": 4, "top_k": 30},
}


class Noise(Source):
    """Rows of small noisy images with two captions each; ``bad`` rows have no image."""

    name, split = "noise", "valid"

    def __init__(self, number=7, bad=()):
        self.number, self.bad = number, bad

    def __len__(self):
        return 2 * self.number

    def __getitem__(self, index):
        image, out = index % self.number, io.BytesIO()
        pixels = np.random.default_rng(image).integers(256, size=(2, 2, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(out, "PNG")
        data = b"broken" if index in self.bad else out.getvalue()
        return Row(f"{index}.png", (data,), f"caption {index}", f"i{image}", str(index))

    def column(self, name):
        return np.arange(len(self)) % self.number + 100

    def captions(self):
        return iter([f"caption {row}" for row in range(len(self))])


class Scorer:
    """Scores texts by a number made of their bytes, and writes down what it was asked."""

    def __init__(self, digest="a"):
        self.name = self.digest = digest
        self.asked = []

    def cosines(self, source, rows, texts):
        self.asked.append((list(rows), [list(each) for each in texts]))
        return [[sum(text.encode()) % 7 / 7 for text in each] for each in texts]

    def features(self, source, rows, texts):
        def spread(numbers):
            return torch.stack([numbers.cos(), numbers.sin()], dim=1)

        code_M = torch.tensor([sum(text.encode()) % 7 / 7 for text in texts])
        return spread(torch.tensor(rows) / 7), spread(code_M)


@pytest.fixture(autouse=True)
def no_meteor(monkeypatch):
    """Which takes seconds to start."""
    monkeypatch.setitem(
        scoring._BY_JAVA, "METEOR", lambda references, _: (0.5, [0.5] * len(references))
    )


def predictor(name="causal"):
    task, model = speaker(name)
    return Predictor(task, model, to_tensor, CPU)


def evaluation(section, ranker=None, scorer=None, num_images=None):
    config = {"data": {"prompt": {"instruction": "say"}}, "generate": section.model_dump(),
              "eval": {"captions": {"num_images": num_images}}}  # fmt: skip
    made = captions.build(Run("caption", Config.model_validate(config), CPU))
    made.scorers = SimpleNamespace(ranker=ranker, scorer=scorer)
    return made


def speak(used, rows, section, ranker=None):
    return evaluation(section, ranker).predict(used, Noise(), rows)


def said(name, method, batch_size):
    """This rank's predictions as JSON."""
    section = Generate(**METHODS[method], batch_size=batch_size, seed=3)
    rows = np.array([6, 0, 1, 5, 4, 3])
    found, bad = speak(predictor(name), rows, section, Scorer())
    assert bad == []
    return [prediction.to_json() for prediction in found]


def everything(batch_size):
    return {
        (name, method): said(name, method, batch_size)
        for name in ("causal", "t5_cross")
        for method in METHODS
    }


@pytest.fixture(scope="module")
def alone():
    """Each image in a batch of its own."""
    return everything(1)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_texts_depend_neither_on_ranks_nor_on_batches(alone, world):
    ranks = distributed.run(everything, world, 5) if world > 1 else [everything(5)]
    for found in ranks:
        assert found == alone


def test_each_image_says_something_else_and_rows_are_in_order(alone):
    for predictions in alone.values():
        assert [p["image_id"] for p in predictions] == ["i0", "i1", "i3", "i4", "i5", "i6"]
        assert len({p["caption"] for p in predictions}) >= 4


def test_the_best_of_n_is_the_first_of_those_that_the_ranker_likes_most(alone):
    for name in ("causal", "t5_cross"):
        ties = 0
        for told in alone[name, "best_of_n"]:
            cosines = told["cosines"]
            assert len(told["candidates"]) == len(cosines) == 4
            assert told["caption"] == told["candidates"][cosines.index(max(cosines))]
            ties += cosines.count(max(cosines)) > 1
            assert cosines == Scorer().cosines(None, [0], [told["candidates"]])[0]
        assert ties or name == "t5_cross"


def test_images_are_encoded_once_and_ranked_in_one_call():
    scorer, used = Scorer(), predictor()
    section = Generate(**METHODS["best_of_n"], batch_size=3)
    found, _ = speak(used, np.arange(7), section, scorer)
    assert used.model.image_encoder.seen == [3, 3, 1]
    assert scorer.asked == [(list(range(7)), [p.candidates for p in found])]


def test_samples_are_others_by_seed_and_the_first_ones_of_more():
    def texts(**changes):
        section = Generate(**METHODS["best_of_n"] | changes)
        found, _ = speak(predictor(), np.arange(3), section, Scorer())
        return [p.candidates or [p.caption] for p in found]

    few, many = texts(num_samples=2), texts(num_samples=5)
    assert [each[:2] for each in many] == few
    assert all(len(set(each)) > 2 for each in many)
    assert [[each[0]] for each in many] == texts(method="sample")
    assert texts(num_samples=2, seed=1) != few


def test_training_draws_on_as_if_nothing_had_been_said():
    used, section = predictor(), Generate(**METHODS["sample"])
    before = torch.get_rng_state()
    speak(used, np.arange(3), section)
    assert torch.equal(torch.get_rng_state(), before)


# --- figures


def evaluate(source=None, scorers=(None, None), method="greedy", num_images=None):
    made = evaluation(Generate(**METHODS[method]), *scorers, num_images)
    return made.score(predictor(), source or Noise())


def test_every_image_is_said_once_beside_all_its_captions():
    found = evaluate()
    assert [p.row for p in found.predictions] == list(range(7))
    assert [p.references for p in found.predictions] == [
        [f"caption {n}", f"caption {n + 7}"] for n in range(7)
    ]
    assert [p.row for p in evaluate(num_images=3).predictions] == [0, 1, 2]
    assert {"Bleu_4", "CIDEr", "ROUGE_L", "distinct_1", "exact_match"} <= found.metrics.keys()
    assert not {"CLIPScore", "scorer", "content_scene"} & found.metrics.keys()


def test_right_captions_score_full_marks(monkeypatch):
    def perfect(*_, **options):
        return {row: [f"Caption {row + 7 * (row % 2)}"] for row in range(7)}, []

    monkeypatch.setattr(Predictor, "predict", perfect)
    found = evaluate(scorers=(None, Scorer()))
    assert found.metrics["exact_match"] == 100
    assert found.metrics["Bleu_1"] == pytest.approx(1)
    cosines = [
        np.cos(row / 7 - sum(f"Caption {row + 7 * (row % 2)}".encode()) % 7 / 7)
        for row in range(7)
    ]  # fmt: skip
    assert found.metrics["CLIP_cosine"] == pytest.approx(np.mean(cosines))
    assert found.metrics["CLIPScore"] == pytest.approx(2.5 * np.mean(np.maximum(cosines, 0)))
    assert "scorer" not in found.metrics  # nothing was ranked


def test_what_cannot_be_read_or_scored_is_left_out(monkeypatch):
    found = evaluate(Noise(bad=(2, 4)))
    assert [(r.index, r.cause) for r in found.bad] == [(2, "not an image"), (4, "not an image")]
    assert [p.row for p in found.predictions] == [0, 1, 3, 5, 6]
    with pytest.raises(FaultError, match=r"none of the 7 images is usable: 7 not an image"):
        evaluate(Noise(bad=range(7)))

    mute = Noise()
    monkeypatch.setattr(mute, "captions", lambda: iter(["", "x", *[""] * 12]))
    assert [p.row for p in evaluate(mute).predictions] == [1]
    monkeypatch.setattr(mute, "captions", lambda: iter([""] * 14))
    with pytest.raises(FaultError, match="none of the 7 images has a caption"):
        evaluate(mute)


@pytest.mark.parametrize(
    ("method", "digests", "told"),
    [
        ("best_of_n", "aa", "the ranker: circular"),
        ("best_of_n", "ab", "not the ranker"),
        ("greedy", "aa", None),
    ],
)
def test_whose_score_it_is_is_told(method, digests, told):
    scorers = [Scorer(digest) for digest in digests]
    assert evaluate(scorers=scorers, method=method).metrics.get("scorer") == told


def test_what_java_did_is_reported(monkeypatch):
    found = evaluate(num_images=1).metrics
    assert (found["tokenizer"], found["METEOR"]) == ("PTB by Java", 0.5)
    assert "SPICE" not in found

    def broken(*_):
        raise JavaError("java ended with code 3: no runtime")

    monkeypatch.setitem(scoring._BY_JAVA, "METEOR", broken)
    assert evaluate(num_images=1).metrics["METEOR"] == "java ended with code 3: no runtime"
    monkeypatch.setattr(scoring, "tokenize", broken)
    with pytest.raises(FaultError, match=r"cannot be scored: .* code 3: no runtime"):
        evaluate(num_images=1)


def scores_on_this_rank():
    """What a rank reports, and whether it was the one to score."""
    calls, real = [], captions.caption_scores

    def counted(*given, **options):
        calls.append(True)
        return real(*given, **options | {"without": ("METEOR", "SPICE")})

    captions.caption_scores = counted
    return captions.score([captions.Prediction("a", 0, "a dog", ["a dog runs"])]), len(calls)


def test_rank_0_scores_for_all():
    (first, calls), *others = distributed.run(scores_on_this_rank, 2)
    assert calls == 1 and "CIDEr" in first
    assert others == [(first, 0)]


def test_of_equal_texts_the_first_is_taken():
    texts = {0: ["two", "a", "two"], 1: ["a", "a", "a"], 2: ["red dot", "red", "dot"]}

    class Ties:
        name = "ties"

        def cosines(self, source, rows, texts):
            return [[0.5, 0.2, 0.5], [0.1, 0.1, 0.1], [-0.3, -0.2, -0.2]]

    found = captions.best_of(Noise(), texts, Ties())
    assert [p.candidates.index(p.caption) for p in found] == [0, 0, 1]
    assert [p.caption for p in found] == ["two", "a", "red"]


def test_the_best_few_of_best_of_n_are_shown():
    evaluation = captions.build(Run("caption", Config(), CPU))
    plain = captions.Prediction("i2", 2, "text", ["own", "other"])
    shown = evaluation.example(Noise(), plain)
    assert (shown.found, shown.captions) == ([("text", None)], ["own", "other"])
    assert (shown.name, shown.image.size) == ("i2", (2, 2))
    best = captions.Prediction("i2", 2, "b", [], ["a", "b", "c", "d"], [0.1, 0.4, 0.4, 0.3])
    assert evaluation.example(Noise(), best).found == [("b", 0.4), ("c", 0.4), ("d", 0.3)]
