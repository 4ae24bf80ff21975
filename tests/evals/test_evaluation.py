"""What all evaluations share: small pictures, the best figure, those from outside the tree."""

import io
import sys
import types

import pytest
import torch
from PIL import Image

from engine.config.schema import Config
from engine.errors import UserError
from engine.evals import retrieval
from engine.evals.evaluation import (
    Evaluation,
    Evaluations,
    Result,
    best_metric,
    missing_metric,
)
from engine.run import Run
from tests.evals.colours import ColourSource, ColourTask, png

CPU = torch.device("cpu")
LIMIT = 10_000_000


def encoded(image, form="PNG", **options):
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def turned():
    exif = Image.Exif()
    exif[274] = 6  # lies on its side
    return encoded(Image.new("RGB", (600, 300), "red"), "JPEG", exif=exif)


@pytest.mark.parametrize(
    ("image", "size", "colour"),
    [
        (encoded(Image.new("RGB", (4000, 1000), "red"), "JPEG"), (224, 56), "red"),
        (turned(), (112, 224), "red"),
        (encoded(Image.new("RGB", (3, 2), "red")), (3, 2), "red"),
        (encoded(Image.new("RGBA", (10, 20), (255, 0, 0, 0))), (10, 20), "white"),
        (encoded(Image.new("L", (900, 9), 0)), (224, 2), "black"),
        (encoded(Image.new("1", (4000, 4000))), (224, 224), "grey"),  # more than is allowed
        (b"no image", (224, 224), "grey"),
        (None, (224, 224), "grey"),
    ],
)
def test_pictures_are_small_and_upright(tmp_path, image, size, colour):
    path = tmp_path / "file"
    path.write_bytes(image or b"")
    want = Image.new("RGB", (1, 1), colour).getpixel((0, 0))
    shows = Evaluation(run(data={"max_image_pixels": LIMIT}))
    for given in (image, path):
        source = ColourSource([(given, "caption", "id", None)])
        shown = shows.thumbnail(source, 0)
        assert (shown.mode, shown.size) == ("RGB", size)
        assert shown.getpixel((1, 1)) == pytest.approx(want, abs=3)  # JPEG


def test_texts_of_a_retrieved_example():
    source = ColourSource([(png((1, 2, 3)), f"caption {n}", f"id{n}", None) for n in range(3)])
    shown = retrieval.build(run())._example(source, 1, [2, 1], [0.5, 0.25])
    assert (shown.captions, shown.name) == (["caption 1"], "id1")
    assert shown.found == [("caption 2", 0.5), ("caption 1", 0.25)]


def run(**sections):
    made = Run("clip", Config.model_validate(sections), CPU)
    made.task = ColourTask()
    return made


# --- which evaluations there are


def outside(**more):
    """A module as one from outside the tree, with an evaluation that counts."""

    class Count(Evaluation):
        best = "count"

        def datasets(self):
            return ["numbers"]

        def check(self):
            raise UserError("checked", key="here")

        def evaluate(self, dataset, model):
            return Result({"count": 3.0, "is": "a number"}, [])

    return types.SimpleNamespace(build=Count, **more)


def test_an_evaluation_from_outside_is_run_beside_those_of_the_task(monkeypatch):
    for name, module in (
        ("outside.count", outside()), ("outside.other", outside(MODALITIES=("labels",))),
    ):  # fmt: skip
        monkeypatch.setitem(sys.modules, name, module)
    made = Evaluations(run(eval={"extra": ["outside.count", "outside.other"]}))
    assert made(torch.nn.Identity()) == {"numbers/count": 3.0, "numbers/is": "a number"}
    assert made.headlines == ["RSUM", "accuracy@1", "count"] and "CIDEr" not in made.curves
    assert made.generation is None
    with pytest.raises(UserError, match="checked"):
        made.check()
    with pytest.raises(UserError, match=r"cannot import 'outside\.none'") as caught:
        Evaluations(run(eval={"extra": ["outside.none"]}))
    assert caught.value.key == "eval.extra.0"


def test_nothing_is_evaluated_any_more_after_ctrl_c(monkeypatch):
    monkeypatch.setitem(sys.modules, "outside.count", outside())
    made = Evaluations(run(eval={"extra": ["outside.count"]}))
    made.run.stop.requested = True
    assert made(torch.nn.Identity()) == {} and made.results == []


# --- the figure that decides which checkpoint is the best

USUAL = ("RSUM", "CIDEr", "accuracy", "exact_F1@2", "accuracy@1")
LABELS = {"a/mAP": 7.0, "a/exact_P@2": 5.0, "a/exact_F1@2": 3.0, "b/exact_F1@2": 4.0, "b/is": "x"}


@pytest.mark.parametrize(
    ("metrics", "name", "value"),
    [
        ({"a/R@1": 1.0, "a/RSUM": 2.0, "b/RSUM": 3.0}, None, 2.0),
        ({"a/R@1": 1.0, "a/RSUM": 2.0, "b/RSUM": 3.0}, "b/RSUM", 3.0),
        ({"a/BLEU-4": 1.0, "a/CIDEr": 2.0}, None, 2.0),
        ({"a/majority_accuracy": 9.0, "a/accuracy": 2.0}, None, 2.0),
        ({"a/accuracy@1": 2.0, "a/accuracy@5": 3.0}, None, 2.0),
        (LABELS, None, 3.0),
        (LABELS, "exact_F1@2", 3.0),
        (LABELS, "b/exact_F1@2", 4.0),
        (LABELS, "F1@2", None),
        (LABELS, "b/is", None),
        ({}, "a/RSUM", None),
        ({"a/commonest_exact_F1@1": 1.0}, None, None),
    ],
)
def test_the_figure_is_the_one_named_or_the_usual_one(metrics, name, value):
    assert best_metric(metrics, name, USUAL) == value


def test_a_name_that_no_figure_has_is_reported():
    for metrics, name in ((LABELS, "exact_F1@2"), (LABELS, None), ({}, "x")):
        assert missing_metric(metrics, name) is None
    message = missing_metric(LABELS, "a/exact_F1@3")
    for word in ("ckpt.best_metric", "'a/exact_F1@3'", "a/exact_F1@2"):
        assert word in message
