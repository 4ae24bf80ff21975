"""NCE, MixUpNCE and sigmoid, values and gradients, against whole matrices in fp64."""

from __future__ import annotations

import itertools

import pytest
import torch

from engine.config import schema
from tests.distributed import run
from tests.losses.oracle import assert_exact, oracle, tiled

COUNTS = {1: [7], 2: [5, 3], 4: [4, 2, 5, 1]}


def _cases(world: int) -> list[tuple[schema.Loss, float, str | None]]:
    """(configuration, log-scale, partners)."""
    cases = []
    groups = [-1, world // 2] if world > 1 else [-1]
    for gather, group, name in itertools.product(("all", "ring"), groups, ("NCE", "MixUpNCE")):
        for backward, smoothing in ((True, 0.0), (False, 0.0), (True, 0.1), (False, 0.1)):
            nce = {"group_size": group, "gather_backward": backward, "smoothing": smoothing}
            config = schema.Loss(name=name, gather=gather, nce_loss=nce, tile_size=3)
            partners = "reversed" if name == "MixUpNCE" else None
            cases.append((config, 2.5, partners))
            cases.append((config, 6.9, partners))  # τ = 0.001: on the path by maxima
    for backward in (True, False):  # without it the directions' partners differ in the gradient
        nce = {"gather_backward": backward}
        cases.append((schema.Loss(name="MixUpNCE", nce_loss=nce, tile_size=2), 2.5, "rolled"))
    for gather, group, log_scale in itertools.product(("all", "ring"), groups, (2.3, 4.6, 6.9)):
        options = {"gather": gather, "sigmoid_loss": {"group_size": group}, "tile_size": 3}
        config = schema.Loss(name="Sigmoid", **options)
        cases.append((config, log_scale, None))
        config = schema.Loss(name="MixUpSigmoid", **options)
        cases += [(config, log_scale, "reversed"), (config, log_scale, "rolled")]
    return cases


def _all_cases(world: int) -> list[list[torch.Tensor]]:
    return [
        tiled(config, COUNTS[world], log_scale, 0.3, partners)
        for config, log_scale, partners in _cases(world)
    ]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_equals_the_oracle(world: int) -> None:
    results = run(_all_cases, world, world) if world > 1 else [_all_cases(1)]
    for number, (config, log_scale, partners) in enumerate(_cases(world)):
        want = oracle(config, COUNTS[world], log_scale, 0.3, partners)
        ranks = [result[number] for result in results]
        loss, image, text, *shared = want
        # The floor: a loss or gradient near zero is a difference of numbers of the logits' size.
        assert_exact(torch.stack([r[0] for r in ranks]).mean(), loss, floor=0.1)
        # What a parameter receives is the mean over ranks of features' gradients, so that each
        # feature's is world times the global loss's.
        assert_exact(torch.cat([r[1] for r in ranks]) / world, image, floor=0.1)
        assert_exact(torch.cat([r[2] for r in ranks]) / world, text, floor=0.1)
        for position, gradient in enumerate(shared, start=3):
            assert_exact(torch.stack([r[position] for r in ranks]).mean(0), gradient, floor=0.1)
