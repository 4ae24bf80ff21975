"""What a run will cost, from some of its steps."""

import numpy as np
import pytest
import torch

from engine.config import schema
from engine.data.samplers import sequential
from engine.data.samplers.pool import SamplerInputs
from engine.modes import check
from engine.types import Row, Sample, Task


class Product(torch.nn.Module):
    """4 × 5 multiply-adds a token, and twice that again in backward."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 5, bias=False)

    def forward(self, batch):
        return {"text_BD": self.layer(batch["x_BTD"])}


def batch(rows, tokens):
    x_BTD = torch.ones(rows, tokens, 4, requires_grad=True)
    return {"x_BTD": x_BTD, "index_B": torch.arange(rows)}


@pytest.mark.parametrize(("budget", "tokens"), [(10**12, (3 * 2 + 1 * 9) / 4), (1, 2)])
def test_flops_of_a_sample_are_the_mean_over_steps_that_differ(monkeypatch, budget, tokens):
    monkeypatch.setattr(check, "_COUNTED", budget)
    found = check.mean_flops(Product(), [batch(3, 2), batch(1, 9)])
    assert found == pytest.approx(tokens * 2 * 4 * 5 * 3)


def test_the_steps_looked_at_lie_all_over_the_epoch():
    whole = sequential.build(SamplerInputs((40, 40), 8, 0))
    some = check._First(whole, 3, [0, 4, 9])
    for place, step in enumerate((0, 4, 9)):
        np.testing.assert_array_equal(some.batch(0, place), whole.batch(0, step)[:3])
    assert {int(some.batch(0, place)[0, 0]) for place in range(3)} == {0, 1}


def test_the_sample_shown_has_an_image_if_any_has():
    class Speaking(Task):
        def describe(self, sample):
            return sample.row.caption, "said"

    task = Speaking(schema.Config())
    alone = Sample(Row("k", caption="alone"), (), 0, 0)
    seen = Sample(Row("k", caption="seen"), (torch.zeros(3, 2, 2, dtype=torch.uint8),), 0, 1)
    assert "prompt: 'seen'" in check.described_sample(task, [alone, seen])
    assert "prompt: 'alone'" in check.described_sample(task, [alone])
    assert check.described_sample(Task(schema.Config()), [alone]) == []
