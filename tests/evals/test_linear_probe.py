"""The probe of a dataset that it must solve, and what it refuses."""

import numpy as np
import pytest
import torch

from engine.config import schema
from engine.errors import FaultError, UserError
from engine.evals import linear_probe
from tests import distributed
from tests.evals.colours import ColourSource, Passing, colours, encoder, png


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
    used = encoder()
    found = linear_probe.evaluate(used, train, valid, config)
    assert found.metrics["accuracy@1"] > 90
    assert (found.num_train, found.num_valid, len(found.bad)) == (60, 59, 1)
    assert (found.regularisation in config.regularisation) == (method == "lbfgs")
    assert sum(used.task.seen["image"]) == 60 + 59  # frozen features, computed once


def test_other_features_can_be_probed():
    def constant(model, batch):
        return torch.ones(len(batch["image_BCHW"]), 2)

    found = linear_probe.evaluate(
        encoder(), source("train"), source("valid"), schema.LinearProbe(), encode=constant
    )
    assert found.metrics["accuracy@1"] < 60


def test_faults_are_named():
    config = schema.LinearProbe()
    with pytest.raises(
        UserError, match=r"different classes: 3 \(blue, green, red\) and 2 \(a, b\)"
    ):
        linear_probe.evaluate(encoder(), source("train"), source("valid", classes="ab"), config)
    unlabelled = ColourSource([(png((1, 2, 3)), "image", 0, None)])
    with pytest.raises(UserError, match="images without a label"):
        linear_probe.evaluate(encoder(), unlabelled, unlabelled, config)

    class Broken(Passing):
        def forward(self, x):
            return x * torch.nan

    with pytest.raises(FaultError, match="60 image features are NaN"):
        linear_probe.evaluate(encoder(model=Broken()), source("train"), source("valid"), config)


def evaluated():
    config = schema.LinearProbe(regularisation=[0.1, 1.0])
    return linear_probe.evaluate(
        encoder(), source("train"), source("valid", seed=1), config
    ).metrics


def test_the_same_on_two_ranks():
    assert distributed.run(evaluated, 2) == [evaluated()] * 2
