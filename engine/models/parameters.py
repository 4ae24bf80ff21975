"""What of a model trains, and how: the table that a run prints before it starts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn


@dataclass(frozen=True, slots=True)
class Row:
    """Parameters of one part that are treated alike."""

    part: str
    count: int  # numbers, not tensors
    tensors: int
    trained: bool
    lr_scale: float | None = None  # None: frozen, or no optimizer given
    weight_decay: float | None = None
    adapter: bool = False

    @property
    def state(self) -> str:
        """trained, frozen or lora."""
        if not self.trained:
            return "frozen"
        return "lora" if self.adapter else "trained"


def is_adapter(name: str) -> bool:
    """Whether a parameter's name is a low-rank adapter's."""
    return ".lora_" in name


def parameter_table(
    model: nn.Module, optimizer_groups: Iterable[Mapping[str, Any]] | None = None
) -> list[Row]:
    """A row for each part of the model, state and optimizer setting, in the model's order.

    A part is a child of the model, or a parameter that the model holds itself. A shared tensor
    counts once. ``optimizer_groups`` are a torch optimizer's ``param_groups``; without them the
    rows only separate trained from frozen.
    """
    settings = {
        id(parameter): (float(group.get("lr_scale", 1.0)), float(group.get("weight_decay", 0.0)))
        for group in optimizer_groups or ()
        for parameter in group["params"]
    }
    rows: dict[tuple[Any, ...], Row] = {}
    for name, parameter in model.named_parameters():
        part, trained = name.split(".")[0], parameter.requires_grad
        if optimizer_groups is not None and id(parameter) not in settings:
            trained = False  # no optimizer steps it
        scale, decay = settings.get(id(parameter), (None, None)) if trained else (None, None)
        adapter = is_adapter(name)
        key = (part, trained, adapter, scale, decay)
        row = rows.setdefault(key, Row(part, 0, 0, trained, scale, decay, adapter))
        rows[key] = replace(row, count=row.count + parameter.numel(), tensors=row.tensors + 1)
    order = {name: place for place, name in enumerate(_parts(model))}
    return sorted(rows.values(), key=lambda row: (order[row.part], not row.trained))


def _parts(model: nn.Module) -> list[str]:
    children = [name for name, _ in model.named_children()]
    return children + [name for name, _ in model.named_parameters(recurse=False)]


def totals(rows: Iterable[Row]) -> tuple[int, int]:
    """(trained, frozen) numbers."""
    trained = frozen = 0
    for row in rows:
        if row.trained:
            trained += row.count
        else:
            frozen += row.count
    return trained, frozen


def format_table(rows: Iterable[Row]) -> str:
    """The table as text, one line a row and one for the totals."""
    rows = list(rows)
    cells = [("part", "parameters", "tensors", "state", "lr scale", "weight decay")]
    for row in rows:
        state = row.state
        scale = "" if row.lr_scale is None else f"{row.lr_scale:g}"
        decay = "" if row.weight_decay is None else f"{row.weight_decay:g}"
        cells.append((row.part, f"{row.count:,}", str(row.tensors), state, scale, decay))
    trained, frozen = totals(rows)
    widths = [max(len(line[column]) for line in cells) for column in range(6)]
    lines = [
        "  ".join(
            cell.ljust(width) if column in (0, 3) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    ]
    return "\n".join([*lines, f"{trained:,} trained, {frozen:,} frozen"])
