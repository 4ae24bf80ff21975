"""Schedules against transformers', step for step, and by hand where it has none."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import engine.torchvision_ops  # noqa: F401  # before transformers
from engine.config.schema import Lr
from engine.errors import UserError
from engine.train import schedules

TOTAL = 120


def _theirs(schedule: Callable[..., Any], **options: Any) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = schedule(optimizer, **options)
    factors = []
    for _ in range(TOTAL + 10):
        factors.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return factors


def _ours(name: str, **options: Any) -> list[float]:
    factor = schedules.factor(Lr(name=name, **options), TOTAL)
    return [factor(step) for step in range(TOTAL + 10)]


@pytest.mark.parametrize("warmup", [0, 1, 12])
def test_schedules_equal_those_of_transformers(warmup: int) -> None:
    from transformers import optimization as peer

    warm: dict[str, Any] = {"num_warmup_steps": warmup}
    both: dict[str, Any] = {**warm, "num_training_steps": TOTAL}
    steps: dict[str, Any] = {"warmup_steps": warmup}
    pairs = [
        (_ours("constant_schedule", **steps), _theirs(peer.get_constant_schedule)),
        (
            _ours("constant_schedule_with_warmup", **steps),
            _theirs(peer.get_constant_schedule_with_warmup, **warm),
        ),
        (
            _ours("linear_schedule_with_warmup", **steps),
            _theirs(peer.get_linear_schedule_with_warmup, **both),
        ),
        (
            _ours("cosine_schedule_with_warmup", **steps),
            _theirs(peer.get_cosine_schedule_with_warmup, **both),
        ),
        (
            _ours("cosine_schedule_with_warmup", **steps, param={"num_cycles": 2.0}),
            _theirs(peer.get_cosine_schedule_with_warmup, **both, num_cycles=2.0),
        ),
        (
            _ours("cosine_schedule_with_warmup_min_lr_scale", **steps, param={"min_lr_scale": 0.1}),
            _theirs(peer.get_cosine_with_min_lr_schedule_with_warmup, **both, min_lr_rate=0.1),
        ),
    ]
    for ours, theirs in pairs:
        assert ours == pytest.approx(theirs, abs=1e-12)


def test_multi_step() -> None:
    for milestones in ([60, 30], [0.25, 60], [0.5, 0.25]):
        factors = _ours(
            "multi_step_schedule_with_warmup",
            warmup_steps=10,
            param={"milestone_steps": milestones, "gamma": 0.5},
        )
        assert factors[:11] == pytest.approx([step / 10 for step in range(11)])
        assert factors[11:30] == [1.0] * 19
        assert factors[30:60] == [0.5] * 30
        assert factors[60:] == [0.25] * 70


def test_recipe_of_the_example_configuration() -> None:
    """2.5 % warm-up, half a cosine down to a tenth."""
    lr = Lr(
        name="cosine_schedule_with_warmup_min_lr_scale",
        warmup_proportion=0.025,
        param={"num_cycles": 0.5, "min_lr_scale": 0.1},
    )
    factor = schedules.factor(lr, 1000)
    assert factor(0) == 0.0
    assert factor(24) == 24 / 25
    assert factor(25) == 1.0
    assert factor(1000) == pytest.approx(0.1)
    middle = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 475 / 975))
    assert factor(500) == pytest.approx(middle)


def test_warmup_by_proportion_or_steps() -> None:
    assert schedules.warmup_steps(Lr(warmup_proportion=0.1), 99) == 9
    assert schedules.warmup_steps(Lr(warmup_proportion=0.1, warmup_steps=4), 99) == 4
    assert schedules.warmup_steps(Lr(warmup_proportion=0.1, warmup_steps=0), 99) == 0
    for name in set(schedules.SCHEDULES) - {"multi_step_schedule_with_warmup"}:
        factor = schedules.factor(Lr(name=name, warmup_steps=50), 10)  # longer than the run
        assert all(0.0 <= factor(step) <= 1.0 for step in range(10))


@pytest.mark.parametrize(
    ("lr", "message", "key"),
    [
        ({"name": "cosine_schedule_with_warmpu"}, "did you mean", "optim.lr.name"),
        ({"param": {"num_cycle": 1}}, "did you mean 'num_cycles'", "optim.lr.param.num_cycle"),
        ({"name": "constant_schedule", "param": {"a": 1}}, "takes none", "optim.lr.param.a"),
        ({"name": "multi_step_schedule_with_warmup"}, "milestone_steps", "optim.lr.param"),
        (
            {
                "name": "cosine_schedule_with_warmup_min_lr_scale",
                "param": {"min_lr_scale": 1.5},
            },
            "1.5",
            "optim.lr.param",
        ),
        ({"param": {"num_cycles": "half"}}, "cosine_schedule_with_warmup: ", "optim.lr.param"),
    ],
)
def test_mistakes_are_named(lr: dict[str, Any], message: str, key: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        schedules.factor(Lr(**lr), 100)
    assert caught.value.key == key
