"""An update as the loop makes it: rate, clipping, the fp16 scaler, bounds, and skipping."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from engine.config import schema
from engine.dist import ddp
from engine.train.precision import Precision
from engine.train.state import TrainState, build_state
from tests.train.tiny import CPU

RATE, CLIP = 0.5, 2.0


class Bounded(nn.Module):
    """Two weights, of which one may not pass 1."""

    def __init__(self) -> None:
        super().__init__()
        self.slow = nn.Parameter(torch.tensor([[1.0, 2.0]]))
        self.logit_scale = nn.Parameter(torch.tensor([0.9]))

    @torch.no_grad()
    def constrain(self) -> None:
        self.logit_scale.clamp_(max=1.0)


def _state(precision: Any = "fp32", clip: float | None = CLIP) -> TrainState:
    config = schema.Config(
        optim=schema.Optim(
            name="torch.optim.SGD",
            lr=schema.Lr(name="linear_schedule_with_warmup", init=RATE),
            groups=[schema.ParamGroup(pattern="slow", lr_scale=0.1)],
            grad_clip=clip,
        )
    )
    state = build_state(config, Bounded(), ddp, CPU, Precision(precision, CPU), 4)
    if precision == "fp16":
        state.parallel.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    return state


def _set_gradients(state: TrainState, slow: list[float], scalar: float) -> None:
    scale = state.parallel.scale(torch.ones(()))
    module: Any = state.module
    module.slow.grad = torch.tensor([slow]) * scale
    module.logit_scale.grad = torch.tensor([scalar]) * scale


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_an_update_by_hand(precision: str) -> None:
    state = _state(precision)
    state.step = 1
    assert state.set_lr() == pytest.approx(RATE * 3 / 4)
    _set_gradients(state, [3.0, 0.0], 4.0)
    assert state.clip() == pytest.approx(5.0)  # of the gradients themselves, not the scaled ones
    state.parallel.update()
    rate, factor = RATE * 3 / 4, CLIP / 5
    want = torch.tensor([[1.0 - 0.1 * rate * 3 * factor, 2.0]])
    torch.testing.assert_close(state.module.slow.detach(), want)
    assert state.module.logit_scale.item() == pytest.approx(0.9 - rate * 4 * factor)
    assert all(parameter.grad is None for parameter in state.module.parameters())


def test_bounds_hold_after_an_update() -> None:
    state = _state(clip=None)
    state.set_lr()
    _set_gradients(state, [0.0, 0.0], -7.0)
    assert state.clip() == pytest.approx(7.0)
    state.parallel.update()
    assert state.module.logit_scale.item() == 1.0


def test_an_overflow_lowers_the_scale_and_leaves_the_weights() -> None:
    state = _state("fp16")
    before = {name: p.detach().clone() for name, p in state.module.named_parameters()}
    state.set_lr()
    _set_gradients(state, [math.inf, 0.0], 4.0)
    assert state.clip() == math.inf
    state.parallel.update()
    assert all(torch.equal(before[n], p) for n, p in state.module.named_parameters())
    assert state.parallel.scaler.get_scale() == 512.0
    assert state.skipped == 0


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_skipped_step_leaves_the_weights(precision: str) -> None:
    state = _state(precision)
    before = {name: p.detach().clone() for name, p in state.module.named_parameters()}
    _set_gradients(state, [math.nan, 0.0], 4.0)
    state.clip()
    state.skip()
    assert all(torch.equal(before[n], p) for n, p in state.module.named_parameters())
    assert all(parameter.grad is None for parameter in state.module.parameters())
    assert state.skipped == 1
