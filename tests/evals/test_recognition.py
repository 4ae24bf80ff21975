"""Recognised labels of a source: the same by any number of ranks and in any batch, scored right."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from engine.config.schema import Config
from engine.data.transforms.pipeline import to_tensor
from engine.errors import FaultError, UserError
from engine.evals import recognition
from engine.evals.predict import Predictor
from engine.evals.recognition import Recognised, RecognitionEvaluation, score
from engine.generate.label_search import label_log_probs
from engine.generate.labels import Label, encode_prompt
from engine.run import Run
from engine.types import Row, Source
from tests import distributed
from tests.generate.labeller import labeller

CPU = torch.device("cpu")
ONE_SHOT = {"method": "one_shot", "num_labels": 6, "first_tokens": 30, "seed": 3}
OWN = [("Q", "dog"), ("cat",), ("Q",), (), ("tree", "P"), ("2", "Q"), ("dog",)]


class Objects(Source):
    """Small noisy images, each in two rows that share its labels out; ``bad`` rows are broken."""

    name, split = "objects", "valid"

    def __init__(self, bad: tuple[int, ...] = ()) -> None:
        self.bad = bad

    def captions(self):
        raise NotImplementedError

    def __len__(self) -> int:
        return 2 * len(OWN)

    def __getitem__(self, index: int) -> Row:
        image, out = index % len(OWN), io.BytesIO()
        pixels = np.random.default_rng(image).integers(256, size=(2, 2, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(out, "PNG")
        data = b"broken" if index in self.bad else out.getvalue()
        labels = OWN[image][:1] if index < len(OWN) else OWN[image][1:]
        return Row(f"{index}.png", (data,), "x", f"i{image}", str(index), labels=labels)

    def column(self, name: str) -> np.ndarray:
        return np.arange(len(self)) % len(OWN) + 100


class Ranker:
    """Likes short labels."""

    def cosines(self, source, rows, texts):
        return [[1 / (1 + len(text.encode())) for text in each] for each in texts]


def evaluation(ranker=None, generate=None, **scoring) -> RecognitionEvaluation:
    generate = ONE_SHOT if generate is None else generate
    config = Config.model_validate({"generate": generate, "eval": {"recognition": scoring}})
    made = RecognitionEvaluation(Run("recognize", config, CPU))
    made.scorers = SimpleNamespace(ranker=ranker, sentences=None)
    return made


def predictor() -> Predictor:
    task, model = labeller()
    return Predictor(task, model, to_tensor, CPU)


def figures(batch_size: int) -> tuple[dict[str, float], list[Any]]:
    """This rank's figures and lines."""
    generate = ONE_SHOT | {"batch_size": batch_size}
    made = evaluation(generate=generate, k=[1, 3], label_set="dataset")
    found = made.score(predictor(), Objects(bad=(2,)))
    assert [(bad.cause, bad.index) for bad in found.bad] == [("no label", 3), ("not an image", 2)]
    return found.metrics, [one.to_json() for one in found.predictions]


@pytest.fixture(scope="module")
def alone() -> tuple[dict[str, float], list[Any]]:
    """Each image in a batch of its own."""
    return figures(1)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_figures_depend_neither_on_ranks_nor_on_batches(alone, world: int) -> None:
    ranks = distributed.run(figures, world, 4) if world > 1 else [figures(4)]
    for metrics, lines in ranks:
        assert metrics == pytest.approx(alone[0], abs=1e-9)
        for line, want in zip(lines, alone[1], strict=True):
            assert line["image_id"] == want["image_id"]
            assert [a["label"] for a in line["labels"]] == [a["label"] for a in want["labels"]]


def test_images_are_scored_against_the_labels_of_all_their_rows(alone) -> None:
    metrics, lines = alone
    assert [line["image_id"] for line in lines] == ["i0", "i1", "i4", "i5", "i6"]
    by_hand = []
    for line in lines:
        own = [label.lower() for label in OWN[int(line["image_id"][1:])]]
        assert line["references"] == own
        said = {label["label"].lower() for label in line["labels"][:3]}
        hits = len(said & set(own))
        p, r = hits / len(said), hits / len(own)
        by_hand.append((p, r, 2 * p * r / (p + r) if hits else 0.0))
    assert any(f1 for _, _, f1 in by_hand)  # a label that the model says by chance is among them
    for name, mean in zip(("P", "R", "F1"), np.mean(by_hand, axis=0), strict=True):
        assert metrics[f"exact_{name}@3"] == pytest.approx(100 * mean)


def test_map_is_by_the_probabilities_of_all_labels_of_the_set(alone, tmp_path) -> None:
    from engine.metrics.recognition import mean_average_precision

    names = sorted({label.lower() for labels in OWN for label in labels})
    kept = [0, 1, 4, 5, 6]
    task, model = labeller()
    pictures = [Image.open(io.BytesIO(Objects()[i].images[0])) for i in kept]
    rows = [torch.from_numpy(np.asarray(picture)) for picture in pictures]
    seen = encode_prompt(task, model, torch.stack(rows).permute(0, 3, 1, 2))
    scores = label_log_probs(
        model.decoder, seen.state, list(map(task.text.ids, names)), rows=99
    ).numpy()
    is_true = np.array([[n in {a.lower() for a in OWN[i]} for n in names] for i in kept])
    assert alone[0]["mAP"] == pytest.approx(100 * mean_average_precision(scores, is_true))
    file = tmp_path / "names.txt"
    file.write_text("\n".join(names[:2]) + "\n")
    made = evaluation(label_set=str(file))
    fewer = made.score(predictor(), Objects(bad=(2,))).metrics["mAP"]
    want = mean_average_precision(scores[:, :2], is_true[:, :2])
    assert fewer == pytest.approx(100 * want)
    had = is_true.mean(axis=0)
    assert alone[0]["chance_mAP"] == pytest.approx(100 * had[had > 0].mean())


def test_labels_are_ranked_by_the_ranker_before_they_are_cut() -> None:
    ranked = evaluation(Ranker(), ONE_SHOT | {"rank": "clip", "num_labels": 2})
    rows = np.array([1, 0])
    found, _ = ranked.predict(predictor(), Objects(), rows)
    plain = evaluation(generate=ONE_SHOT | {"num_labels": 30})
    every, _ = plain.predict(predictor(), Objects(), rows)
    assert [one.row for one in found] == [0, 1]
    for one, whole in zip(found, every, strict=True):
        liked = sorted((1 / (1 + len(label.text.encode())) for label in whole.labels), reverse=True)
        assert [label.score for label in one.labels] == pytest.approx(liked[:2])


def test_sets_of_labels_that_cannot_be_asked_are_refused(tmp_path, monkeypatch) -> None:
    file = tmp_path / "names.txt"
    file.write_text("dog\nparis, france\n")
    asked = {str(file): "separator in label: 'paris, france'", "dataset": "too many",
             str(tmp_path / "none.txt"): "none.txt"}  # fmt: skip
    for name, told in asked.items():
        monkeypatch.setattr(recognition, "_MAX_LABEL_SET", 3)
        with pytest.raises(UserError, match=told) as caught:
            evaluation(label_set=name).score(predictor(), Objects())
        assert caught.value.key == "eval.recognition.label_set"


def test_a_source_without_any_label_is_a_fault(monkeypatch) -> None:
    monkeypatch.setattr(f"{__name__}.OWN", [()] * 3)
    with pytest.raises(FaultError, match="objects: no image of 3 is usable: 3 no label"):
        evaluation().score(predictor(), Objects())


# --- likeness of meaning


def recognised(said: list[str], own: list[str]) -> Recognised:
    return Recognised("i", 0, [Label(text, 0.5, 0.5, (1,)) for text in said], own)


def test_scores_by_meaning_use_each_texts_vector_once() -> None:
    vectors = {"a": (1, 0), "b": (0.6, 0.8), "c": (0, 1)}
    asked: list[list[str]] = []

    def embed(texts):
        asked.append(list(texts))
        return np.array([vectors[text] for text in texts])

    found = score([recognised(["b", "a", "c"], ["a"])], [1, 2], embed)
    assert asked == [["a", "b"]]  # not the third, which no k asks for
    assert found["semantic_R@1"] == found["semantic_P@1"] == pytest.approx(60)
    assert found["semantic_R@2"] == pytest.approx(100)
    assert found["semantic_P@2"] == pytest.approx(80)
    assert found["exact_R@2"] == 100 and found["exact_P@2"] == 50


def test_the_commonest_labels_are_scored_beside() -> None:
    own = [["dog", "cat"], ["dog"], ["owl", "dog", "cat"], ["hat"]]
    found = score([recognised(["hat"], labels) for labels in own], [1, 2])
    assert found["exact_F1@1"] == pytest.approx(100 / 4)
    # dog: precision 1, recall 1/2, 1, 1/3, and nothing of the last; with cat: 1, 1/2, 1
    assert found["commonest_exact_F1@1"] == pytest.approx(100 / 4 * (2 / 3 + 1 + 1 / 2))
    assert found["commonest_exact_F1@2"] == pytest.approx(100 / 4 * (1 + 2 / 3 + 4 / 5))
    assert found["commonest_lemma_F1@2"] == found["commonest_exact_F1@2"]
