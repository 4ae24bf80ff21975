"""The next-token loss equals a loop over rows without padding."""

import pytest
import torch
import torch.nn.functional as F

from engine.losses.language_model import IGNORED, row_losses, token_losses


def make(dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(4, 6, 8, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(20, 8, generator=generator, dtype=dtype).requires_grad_()
    bias = torch.randn(20, generator=generator, dtype=dtype).requires_grad_()
    labels = torch.randint(0, 20, (4, 6), generator=generator)
    labels[torch.rand(4, 6, generator=generator) < 0.4] = IGNORED
    labels[2] = IGNORED  # a row of which nothing is supervised
    return hidden, labels, weight, bias


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("with_bias", [False, True])
def test_losses_and_gradients_equal_a_loop_over_tokens(smoothing: float, with_bias: bool) -> None:
    hidden, labels, weight, bias = make()
    inputs = (hidden, weight, bias) if with_bias else (hidden, weight)
    got = row_losses(hidden, labels, *inputs[1:], label_smoothing=smoothing)
    pull = torch.tensor([1.0, -2.0, 3.0, 0.5], dtype=torch.float64)
    gradients = torch.autograd.grad(got @ pull, inputs)

    rows = []
    for states, wanted in zip(hidden, labels, strict=True):
        total = states.new_zeros(())
        for state, label in zip(states, wanted, strict=True):
            if label != IGNORED:
                logits = weight @ state + (bias if with_bias else 0)
                total = total + F.cross_entropy(logits, label, label_smoothing=smoothing)
        rows.append(total)
    want = torch.stack(rows)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    for mine, true in zip(gradients, torch.autograd.grad(want @ pull, inputs), strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-10, atol=1e-12)


def test_nothing_supervised_gives_zero_with_a_graph() -> None:
    hidden, labels, weight, _ = make()
    loss = row_losses(hidden, torch.full_like(labels, IGNORED), weight)
    assert torch.equal(loss, torch.zeros(4, dtype=torch.float64))
    loss.sum().backward()
    assert not hidden.grad.any() and not weight.grad.any()


def test_half_precision_comes_out_in_fp32() -> None:
    hidden, labels, weight, _ = make(torch.float32)
    loss, rows = token_losses(hidden.bfloat16(), labels, weight)
    assert loss.dtype == torch.float32
    assert torch.equal(rows, (labels != IGNORED).nonzero()[:, 0])
    exact, _ = token_losses(hidden, labels, weight)
    assert (loss - exact).abs().max() < 0.1
