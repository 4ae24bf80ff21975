"""Rows of a table of tokens: they train; neither the table nor weight decay touches the rest."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from engine.config.schema import Optim, ParamGroup
from engine.errors import UserError
from engine.models.parameters import add_token_rows
from engine.train import optim

IDS = {"<a>": 3, "<b>": 7}


class Tied(nn.Module):
    """A table of tokens that is the output layer too."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.other = nn.Embedding(9, 4), nn.Embedding(2, 4)
        self.table_scale = nn.Parameter(torch.ones(()))  # which the pattern finds, and freezes

    def forward(self, ids):
        return (self.table(ids) + self.other.weight[0]) @ self.table.weight.T


def groups(tokens, pattern=r"^table"):
    return [ParamGroup(pattern=pattern, train="rows", tokens=tokens), ParamGroup(pattern=".")]


def test_only_the_named_rows_change_as_if_they_stood_in_the_table() -> None:
    model, ids = Tied(), torch.tensor([[3, 1, 7], [7, 0, 2]])
    before, plain = model.table.weight.detach().clone(), model(ids).detach()
    section = Optim(groups=groups(["<a>", "<b>"]), param={"weight_decay": 0.5})
    add_token_rows(model, section.groups, IDS.get)
    assert torch.equal(model(ids), plain) and not model.table.weight.requires_grad
    optimizer = optim.build(model, section)
    model(ids).square().sum().backward()
    rows = model.table.token_rows.rows_RD
    peer = Tied()
    looked_up = nn.functional.embedding(ids, peer.table.weight)
    out = (looked_up + peer.other.weight[0]) @ peer.table.weight.detach().T
    out.square().sum().backward()  # the output layer keeps its rows
    torch.testing.assert_close(rows.grad, peer.table.weight.grad[[3, 7]])
    optimizer.step()
    assert torch.equal(model.table.weight, before)
    assert (rows != before[[3, 7]]).all()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"table.token_rows.rows_RD", "other.weight"}
    assert torch.equal(model.table(torch.tensor([3, 7, 1])), torch.cat([rows, before[1:2]]))


@pytest.mark.parametrize(
    ("given", "key", "told"),
    [
        (groups(["<c>"]), "0.tokens", "has no token '<c>'"),
        (groups([]), "0.tokens", "go together"),
        ([ParamGroup(pattern=".", tokens=["<a>"])], "0.tokens", "go together"),
        (groups(["<a>"], "^tables"), "0.pattern", "finds 0 tables, .* table.weight, other.weight"),
        (groups(["<a>"], "weight"), "0.pattern", "finds 2 tables"),
    ],
)
def test_mistakes_are_named(given, key, told) -> None:
    with pytest.raises(UserError, match=told) as caught:
        add_token_rows(Tied(), given, IDS.get)
    assert caught.value.key == f"optim.groups.{key}"
