"""Zero-shot classification with known right answers."""

import pytest
import torch
import torch.nn.functional as F

from engine.errors import UserError
from engine.evals import zero_shot
from engine.evals.classes import Prompts
from engine.metrics import classification
from tests import distributed
from tests.evals.colours import ColourSource, colours, png, predictor

NAMES = ("250 10 10", "10 250 10", "10 10 250", "200 200 10", "10 200 200", "200 10 200")
CLASSES = tuple((name,) for name in NAMES)


def source(count=40, classes=None):
    """Images of random colours, each labelled with the class whose colour is nearest but one."""
    rows = []
    unit = F.normalize(torch.tensor([[float(v) for v in c.split()] for c in NAMES]), dim=1)
    for i, colour in enumerate(colours(count, seed=3)):
        score = unit @ torch.tensor(colour).float()
        rank = 0 if i % 4 else 1  # one in four is off by one
        rows.append((png(colour), "image", i, int(score.argsort(descending=True)[rank])))
    return ColourSource(rows, classes)


def test_accuracies():
    found = zero_shot.evaluate(predictor(), source(), Prompts(CLASSES, ("{}",)))
    assert found.metrics["accuracy@1"] == pytest.approx(75.0)
    assert found.metrics["accuracy@5"] == 100.0
    assert found.bad == []


def test_a_class_is_the_normed_mean_of_its_normed_prompts():
    # The task reads the first three numbers, so that a template can put some before the name.
    templates = ("{}", "100 {}", "0 255 {}")
    features = zero_shot.class_features(predictor(), Prompts(CLASSES, templates))
    for label, name in enumerate(NAMES):
        numbers = [float(value) for value in name.split()]
        prompts = torch.tensor([numbers, [100, *numbers[:2]], [0, 255, numbers[0]]]) + 1e-3
        expected = F.normalize(F.normalize(prompts, dim=1).mean(0), dim=0)
        torch.testing.assert_close(features[label], expected)


def test_a_class_of_several_names_is_the_mean_of_all():
    features = zero_shot.class_features(
        predictor(), Prompts((("10 0 0",), ("0 9 0", "0 0 5")), ("{}",))
    )
    torch.testing.assert_close(
        features, torch.tensor([[1, 0, 0], [0, 0.5**0.5, 0.5**0.5]]), atol=1e-3, rtol=0
    )


def test_classes_are_put_in_the_order_of_the_labels():
    turned = tuple(reversed(CLASSES))
    folders = tuple(f"n{label}" for label in reversed(range(6)))
    data = source(classes=[f"n{label}" for label in range(6)])
    found = zero_shot.evaluate(predictor(), data, Prompts(turned, ("{}",), folders))
    assert found.metrics["accuracy@1"] == pytest.approx(75.0)


def test_equals_the_metric_on_all_scores_at_once(monkeypatch):
    data, prompts = source(), Prompts(CLASSES, ("{}", "0 {}"))
    monkeypatch.setattr(zero_shot, "_CHUNK", 7)
    found = zero_shot.evaluate(predictor(), data, prompts)
    used = predictor()
    images = used.images(data, torch.arange(40).numpy())
    scores = images.features @ zero_shot.class_features(used, prompts).T
    ranks = classification.label_ranks(scores, images.labels)
    assert found.metrics == classification.from_ranks(ranks, images.labels)


def test_bad_images_are_left_out_and_named():
    data = source()
    data.rows[4] = (b"broken", "image", 4, 0)
    used = predictor()
    found = zero_shot.evaluate(used, data, Prompts(CLASSES, ("{}",)), num_rows=30)
    assert sum(used.task.seen["image"]) == 29
    assert [record.index for record in found.bad] == [4]


def test_fewer_rows_are_spread_over_the_classes():
    data = ColourSource(sorted(source().rows, key=lambda row: row[3]))
    used = predictor()
    found = zero_shot.evaluate(used, data, Prompts(CLASSES, ("{}",)), num_rows=10)
    assert sum(used.task.seen["image"]) == 10
    whole = zero_shot.evaluate(predictor(), data, Prompts(CLASSES, ("{}",))).metrics
    part = ColourSource(data.rows[::4])
    expected = zero_shot.evaluate(predictor(), part, Prompts(CLASSES, ("{}",))).metrics
    assert found.metrics == expected != whole


def test_faults_are_the_users_to_mend():
    prompts = Prompts(CLASSES, ("{}",))
    unlabelled = ColourSource([(png((1, 2, 3)), "image", 0, None)])
    with pytest.raises(UserError, match="row 0 of dataset 'colours' has no label"):
        zero_shot.evaluate(predictor(), unlabelled, prompts)
    beyond = ColourSource([(png((1, 2, 3)), "image", 0, 6)])
    with pytest.raises(UserError, match="label 6, but there are 6 classes"):
        zero_shot.evaluate(predictor(), beyond, prompts)
    with pytest.raises(UserError, match="no image that can be used: 1 not an image"):
        zero_shot.evaluate(predictor(), ColourSource([(b"broken", "image", 0, 0)]), prompts)


def evaluated():
    prompts = Prompts((*CLASSES[:5], (NAMES[5], "190 0 180")), ("{}", "0 {}"))
    return zero_shot.evaluate(predictor(batch_size=5), source(), prompts).metrics


def test_the_same_on_many_ranks():
    assert distributed.run(evaluated, 4) == [evaluated()] * 4
