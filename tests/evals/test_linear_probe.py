"""The probe of a dataset that it must solve, and what it refuses."""

import numpy as np
import pytest
import torch

from engine.config import schema
from engine.errors import FaultError, UserError
from engine.evals import linear_probe
from tests import distributed
from tests.evals.colours import ColourSource, Passing, colours, png, predictor


def source(split, count=60, classes=("blue", "green", "red"), seed=0):
    rows = []
    for i, colour in enumerate(colours(count, seed)):
        rows.append((png(colour), "image", i, 2 - int(np.argmax(colour))))
    made = ColourSource(rows, list(classes))
    made.split = split
    return made


@pytest.mark.parametrize("method", ["lbfgs", "sgd"])
def test_probe_of_a_dataset(method):
    config = schema.LinearProbe(method=method, epochs=40, batch_size=32, lr=1.0)
    train, valid = source("train"), source("valid", seed=1)
    valid.rows[3] = (b"broken", "image", 3, 0)
    used = predictor()
    found = linear_probe.evaluate(used, train, valid, config)
    assert found.metrics["accuracy@1"] > 90
    assert [record.index for record in found.bad] == [3]
    assert sum(used.task.seen["image"]) == 60 + 59  # frozen features, computed once


def test_features_that_say_nothing_are_not_enough():
    class Constant(Passing):
        def forward(self, x):
            return torch.ones(len(x), 2)

    train, valid = source("train"), source("valid")
    found = linear_probe.evaluate(predictor(model=Constant()), train, valid, schema.LinearProbe())
    assert found.metrics["accuracy@1"] < 60


def test_faults_are_named():
    config = schema.LinearProbe()
    with pytest.raises(
        UserError, match=r"different classes: 3 \(blue, green, red\) and 2 \(a, b\)"
    ):
        linear_probe.evaluate(predictor(), source("train"), source("valid", classes="ab"), config)
    unlabelled = ColourSource([(png((1, 2, 3)), "image", 0, None)])
    with pytest.raises(UserError, match="row 0 of dataset 'colours' has no label"):
        linear_probe.evaluate(predictor(), unlabelled, unlabelled, config)

    class Broken(Passing):
        def forward(self, x):
            return x * torch.nan

    with pytest.raises(FaultError, match="60 image features are NaN"):
        linear_probe.evaluate(predictor(model=Broken()), source("train"), source("valid"), config)


def evaluated():
    config = schema.LinearProbe(regularisation=[0.1, 1.0])
    return linear_probe.evaluate(
        predictor(), source("train"), source("valid", seed=1), config
    ).metrics


def test_the_same_on_two_ranks():
    assert distributed.run(evaluated, 2) == [evaluated()] * 2


# --- linear classifiers against scikit-learn, their own gradients, and each other


def blobs(count, num_classes=4, width=6, seed=0, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(num_classes, width, generator=torch.Generator().manual_seed(99))
    label = torch.randint(0, num_classes, (count,), generator=generator)
    return centres[label] + spread * torch.randn(count, width, generator=generator), label


@pytest.mark.parametrize("regularisation", [1e-3, 1.0, 30.0])
def test_lbfgs_equals_scikit_learn(regularisation):
    sklearn = pytest.importorskip("sklearn.linear_model")
    x, y = blobs(150)
    ours = linear_probe.fit_lbfgs(x, y, 4, regularisation, tolerance=1e-8)
    theirs = sklearn.LogisticRegression(C=1 / regularisation, tol=1e-10, max_iter=10_000)
    theirs.fit(x.double().numpy(), y.numpy())
    # Adding one number to all biases changes nothing, so they are compared around their mean.
    bias = theirs.intercept_ - theirs.intercept_.mean()
    np.testing.assert_allclose((ours.bias - ours.bias.mean()).numpy(), bias, atol=2e-4, rtol=1e-3)
    np.testing.assert_allclose(ours.weight.T.numpy(), theirs.coef_, atol=2e-4, rtol=1e-3)


def test_lbfgs_stands_where_the_gradient_is_zero():
    x, y = blobs(80)
    fitted = linear_probe.fit_lbfgs(x, y, 4, 0.5, tolerance=1e-8)
    weight, bias = fitted.weight.clone().requires_grad_(), fitted.bias.clone().requires_grad_()
    loss = torch.nn.functional.cross_entropy(x.double() @ weight + bias, y, reduction="sum")
    (loss + 0.25 * weight.square().sum()).backward()
    assert weight.grad.abs().max() < 1e-4
    assert bias.grad.abs().max() < 1e-4


def test_chunks_and_warm_starts_change_nothing(monkeypatch):
    x, y = blobs(100)
    whole = linear_probe.fit_lbfgs(x, y, 4, 0.1, tolerance=1e-8)
    monkeypatch.setattr(linear_probe, "_CHUNK", 13)
    start = linear_probe.fit_lbfgs(x, y, 4, 10.0)
    parts = linear_probe.fit_lbfgs(x, y, 4, 0.1, start=start, tolerance=1e-8)
    torch.testing.assert_close(parts(x), whole(x), atol=1e-3, rtol=1e-3)


def test_regularisation_is_chosen_on_held_out_images():
    # Few images of many noisy dimensions: next to no regularisation fits the noise.
    x, y = blobs(300, width=100, spread=4.0)
    chosen = linear_probe.choose_regularisation(x, y, 4, [1e-6, 300.0])
    assert chosen == 300.0
    accuracy = {}
    for candidate in (1e-6, 300.0):
        fitted = linear_probe.fit_lbfgs(x, y, 4, candidate)
        xv, yv = blobs(2000, width=100, spread=4.0, seed=1)
        accuracy[candidate] = (fitted(xv).argmax(1) == yv).double().mean()
    assert accuracy[300.0] > accuracy[1e-6]
    assert linear_probe.choose_regularisation(x, y, 4, [0.3]) == 0.3


def test_a_tenth_of_each_class_is_held_out():
    label = torch.tensor([0] * 50 + [1] * 11 + [2])
    held = linear_probe.held_out(label, seed=0)
    assert [int(held[label == c].sum()) for c in range(3)] == [5, 2, 0]
    assert torch.equal(held, linear_probe.held_out(label, seed=0))
    assert not torch.equal(held, linear_probe.held_out(label, seed=1))


def test_steps_come_near_to_the_exact_fit():
    x, y = blobs(300)
    exact = linear_probe.fit_lbfgs(x, y, 4, 1e-6)
    config = schema.LinearProbe(method="sgd", epochs=60, batch_size=64, lr=0.5)
    steps = linear_probe.fit_steps(x, y, 4, config)

    def loss(linear):
        return torch.nn.functional.cross_entropy(linear(x).double(), y).item()

    assert loss(exact) <= loss(steps) < loss(exact) + 0.01


def test_lars_takes_the_steps_where_it_is_asked_for(monkeypatch):
    made = []

    def factory(parameters, lr):
        made.append(torch.optim.Adam(parameters, lr))
        return made[-1]

    x, y = blobs(60)
    config = schema.LinearProbe(method="lars", epochs=3, batch_size=20)
    monkeypatch.setattr("engine.train.lars.LARS", factory)
    linear_probe.fit_steps(x, y, 4, config)
    assert len(made) == 1
    assert made[0].state[made[0].param_groups[0]["params"][0]]["step"] == 9


def test_features_that_nearly_agree_take_few_iterations(monkeypatch):
    # What an untrained encoder puts out: almost one direction, with small differences.
    x, y = blobs(200, width=20)
    x = torch.nn.functional.normalize(torch.randn(20) * 20 + 0.01 * x, dim=1)
    calls = 0
    real = torch.Tensor.log_softmax

    def counted(*args):
        nonlocal calls
        calls += 1
        return real(*args)

    monkeypatch.setattr(torch.Tensor, "log_softmax", counted)
    linear_probe.fit_lbfgs(x, y, 4, 1e-4)
    assert calls < 200
