"""LARS against its formula written out, and where a ratio of norms makes no sense."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import engine.torchvision_ops  # noqa: F401  # before timm

from timm.optim import Lars  # isort: skip
from engine.train.lars import LARS
from tests.train import lars_by_hand


def _train(kind: Any, dtype: torch.dtype, steps: int = 20, **options: Any) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = ((4, 5), (5, 2), (5,))
    weights = [torch.randn(*size, generator=generator) for size in sizes]
    parameters = [nn.Parameter(weight.to(dtype)) for weight in weights]
    x = torch.randn(30, 4, generator=generator).to(dtype)
    optimizer = kind(parameters, **options)
    for _ in range(steps):
        optimizer.zero_grad()
        hidden = (x @ parameters[0] + parameters[2]).tanh()
        hidden.matmul(parameters[1]).square().mean().backward()
        optimizer.step()
    return [parameter.detach() for parameter in parameters]


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 1e-3, 0.5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equals_the_formula_bit_for_bit(
    nesterov: bool, weight_decay: float, dtype: torch.dtype
) -> None:
    options = {
        "lr": 0.3,
        "momentum": 0.8,
        "nesterov": nesterov,
        "weight_decay": weight_decay,
        "trust_coefficient": 0.02,
    }
    ours = _train(LARS, dtype, **options)
    by_hand = _train(lars_by_hand.LARS, dtype, **options)
    assert all(torch.equal(got, want) for got, want in zip(ours, by_hand, strict=True))
    if weight_decay:  # timm scales whatever decays

        def timms(parameters: list[nn.Parameter], **more: Any) -> Lars:
            *layers, vector = parameters
            return Lars([{"params": layers}, {"params": [vector], "weight_decay": 0.0}], **more)

        options["trust_coeff"] = options.pop("trust_coefficient")
        theirs = _train(timms, dtype, **options)
        assert all(torch.equal(got, want) for got, want in zip(ours, theirs, strict=True))


def test_a_checkpoint_of_the_class_written_out_goes_on() -> None:
    """Groups had neither timm's keys nor another order."""
    weights = [nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(3))]
    twins = copy.deepcopy(weights)
    before, after = lars_by_hand.LARS(weights, lr=0.1, trust_coefficient=0.1), LARS(twins, lr=9.0)

    def step(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
        for parameter in parameters:
            parameter.grad = parameter.detach().sin()
        optimizer.step()

    step(before, weights)
    with torch.no_grad():
        for twin, weight in zip(twins, weights, strict=True):
            twin.copy_(weight)
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    for _ in range(3):
        step(before, weights)
        step(after, twins)
    assert all(map(torch.equal, weights, twins))


def test_one_step_by_hand() -> None:
    w = nn.Parameter(torch.tensor([[3.0, 4.0]]))
    w.grad = torch.tensor([[0.0, 2.0]])
    LARS([w], lr=0.5, weight_decay=0.1, trust_coefficient=0.01, eps=0.0).step()
    trust = 0.01 * 5.0 / (2.0 + 0.1 * 5.0)
    want = torch.tensor([[3.0 - 0.5 * trust * 0.3, 4.0 - 0.5 * trust * 2.4]])
    torch.testing.assert_close(w.detach(), want)


def test_vectors_are_plain_momentum_sgd() -> None:
    ours, theirs = (nn.Parameter(torch.arange(3.0)) for _ in range(2))
    lars = LARS([ours], lr=0.1, momentum=0.9, weight_decay=0.5)
    sgd = torch.optim.SGD([theirs], lr=0.1, momentum=0.9)
    for step in range(4):
        ours.grad = theirs.grad = torch.tensor([1.0, -2.0, step])
        lars.step()
        sgd.step()
    torch.testing.assert_close(ours, theirs)


def test_a_layer_of_zeros_moves() -> None:
    w = nn.Parameter(torch.zeros(2, 2))
    w.grad = torch.ones(2, 2)
    LARS([w], lr=0.1).step()
    torch.testing.assert_close(w.detach(), torch.full((2, 2), -0.1))


def test_a_layer_without_gradient_stays_finite_and_none_is_skipped() -> None:
    still, idle = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    still.grad = torch.zeros(2, 2)
    LARS([still, idle], lr=0.1).step()
    torch.testing.assert_close(still.detach(), torch.ones(2, 2))
    torch.testing.assert_close(idle.detach(), torch.ones(2, 2))


def test_state_is_restored() -> None:
    w = nn.Parameter(torch.ones(2, 2))
    optimizer = LARS([w], lr=0.1)
    w.grad = torch.ones(2, 2)
    optimizer.step()
    twin = nn.Parameter(w.detach().clone())
    other = LARS([twin], lr=9.0)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    twin.grad = w.grad.clone()
    optimizer.step()
    other.step()
    assert torch.equal(twin, w)


def test_negative_values_are_refused() -> None:
    with pytest.raises(ValueError, match=r"momentum value: -0.1"):
        LARS([nn.Parameter(torch.ones(1))], momentum=-0.1)
    with pytest.raises(ValueError, match=r"eps is -1"):
        LARS([nn.Parameter(torch.ones(1))], eps=-1)
