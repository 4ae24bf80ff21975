"""Single rows of a table of tokens, trained while the table stays as it is.

A row is a parameter of its own, so that neither the gradient nor weight decay reaches the others.
Where an output layer shares the table, it keeps the row that it had.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from engine.config.schema import ParamGroup
from engine.errors import UserError


class TokenRows(nn.Module):
    """Rows that stand in for those of ``table``."""

    ids_R: Tensor

    def __init__(self, table: nn.Embedding, ids: Sequence[int]) -> None:
        super().__init__()
        self.register_buffer("ids_R", torch.tensor(ids), persistent=False)
        self.rows_RD = nn.Parameter(table.weight.detach()[list(ids)].clone())

    def forward(self, ids: Tensor, found: Tensor) -> Tensor:
        """What the table ``found`` for ``ids``, with the rows of these tokens in their places."""
        match = ids[..., None] == self.ids_R
        rows = self.rows_RD[match.to(torch.uint8).argmax(-1)]
        return torch.where(match.any(-1, keepdim=True), rows.to(found.dtype), found)


def is_token_row(name: str) -> bool:
    """Whether a parameter's name is that of rows trained alone."""
    return ".token_rows." in name


def add_token_rows(
    model: nn.Module, groups: Sequence[ParamGroup], token_to_id: Callable[[str], int | None]
) -> None:
    """Give the tables that groups of ``train: rows`` find rows of their own for ``tokens``.

    The rest of such a table freezes. Raises UserError for a token that there is none of, and where
    a pattern finds no table of tokens, or several.
    """
    for number, group in enumerate(groups):
        key = f"optim.groups.{number}"
        if (group.train == "rows") != bool(group.tokens):
            raise UserError(
                "train: rows and tokens: [TOKEN, …] go together; write both or neither",
                key=f"{key}.tokens",
            )
        if not group.tokens:
            continue
        ids = [token_to_id(token) for token in group.tokens]
        known = [i for i in ids if i is not None]
        if len(known) < len(ids):
            missing = group.tokens[ids.index(None)]
            raise UserError(
                f"the tokenizer has no token {missing!r}; a mark of the image is named by "
                "model.decoder.image_token",
                key=f"{key}.tokens",
            )
        table = _table(model, group.pattern, f"{key}.pattern")
        table.weight.requires_grad_(False)
        table.token_rows = TokenRows(table, known)
        table.register_forward_hook(_with_rows)


def _table(model: nn.Module, pattern: str, key: str) -> nn.Embedding:
    tables = {n: m for n, m in model.named_modules() if isinstance(m, nn.Embedding)}
    found = [n for n in tables if re.search(pattern, f"{n}.weight")]
    if len(found) != 1:
        raise UserError(
            f"the pattern {pattern!r} finds {len(found)} tables, and train: rows takes one; "
            f"tables are {', '.join(f'{name}.weight' for name in tables)}",
            key=key,
        )
    return tables[found[0]]


def _with_rows(table: Any, given: tuple[Tensor, ...], found: Tensor) -> Tensor:
    return table.token_rows(given[0], found)
