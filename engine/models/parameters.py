"""What of a model trains: whole parameters, single rows of a table of tokens, low-rank adapters
(LoRA, arXiv 2106.09685, by peft); and the table of it that a run prints before it starts."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from engine.config.schema import Lora, ParamGroup
from engine.errors import UserError

WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"


def is_adapter(name: str) -> bool:
    """Whether a parameter's name is a low-rank adapter's."""
    return ".lora_" in name


def is_token_row(name: str) -> bool:
    """Whether a parameter's name is that of rows trained alone."""
    return ".token_rows." in name


# --- rows of a table of tokens


class TokenRows(nn.Module):
    """Rows that stand in for those of ``table``, which stays as it is.

    They are a parameter of their own, so that neither the gradient nor weight decay reaches the
    others. Where an output layer shares the table, it keeps the rows that it had.
    """

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
            raise UserError("train: rows and tokens: [TOKEN, …] go together; write both or neither",
                            key=f"{key}.tokens")  # fmt: skip
        if not group.tokens:
            continue
        ids = [token_to_id(token) for token in group.tokens]
        known = [i for i in ids if i is not None]
        if len(known) < len(ids):
            raise UserError(
                f"the tokenizer has no token {group.tokens[ids.index(None)]!r}; a mark of the "
                "image is named by model.decoder.image_token",
                key=f"{key}.tokens",
            )
        table: Any = _table(model, group.pattern, f"{key}.pattern")
        table.weight.requires_grad_(False)
        table.token_rows = TokenRows(table, known)
        table.register_forward_hook(_with_rows)


def _table(model: nn.Module, pattern: str, key: str) -> nn.Embedding:
    tables = {f"{n}.weight": m for n, m in model.named_modules() if isinstance(m, nn.Embedding)}
    found = [name for name in tables if re.search(pattern, name)]
    if len(found) != 1:
        raise UserError(f"the pattern {pattern!r} finds {len(found)} tables, and train: rows takes "
                        f"one; tables are {', '.join(tables)}", key=key)  # fmt: skip
    return tables[found[0]]


def _with_rows(table: Any, given: tuple[Tensor, ...], found: Tensor) -> Tensor:
    return table.token_rows(given[0], found)


# --- adapters; peft takes a while to import, and not all need it


def add_lora(model: nn.Module, patterns: Sequence[str], earlier: Sequence[str], lora: Lora) -> None:
    """Add adapters to the layers whose weights' names a pattern finds; their own weights freeze.

    ``earlier`` patterns take parameters away from ``patterns``: of ordered groups the first that
    matches rules. What else trains stays as it is. Raises UserError where nothing is found.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
        from transformers.pytorch_utils import Conv1D
    except ImportError as error:
        raise UserError(
            f"train: lora needs peft ({error}): pip install -e .[caption]", key="optim.groups"
        ) from error
    layers = (nn.Linear, nn.Conv2d, nn.Embedding, Conv1D)
    names = [f"{name}.weight" for name, m in model.named_modules() if isinstance(m, layers)]
    targets = [
        name.removesuffix(".weight")
        for name in names
        if any(re.search(pattern, name) for pattern in patterns)
        and not any(re.search(pattern, name) for pattern in earlier)
    ]
    if not targets:
        raise UserError(
            f"train: lora finds no layer by {' or '.join(map(repr, patterns))}; the model has "
            f"{', '.join(names[:: max(1, len(names) // 3)][:3])} and more",
            key="optim.groups",
        )
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        use_rslora=lora.rank_stabilised,
        lora_dropout=lora.dropout,
        target_modules=targets,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of GPT-2's transposed layers, which peft sees to
        inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_adapter(name) or name in trained)


def adapted_layers(model: nn.Module) -> dict[str, Any]:
    """Layers that have adapters, by their names."""
    if not any(is_adapter(name) for name, _ in model.named_parameters()):
        return {}
    from peft.tuners.lora import LoraLayer

    return {name: m for name, m in model.named_modules() if isinstance(m, LoraLayer)}


def merge(model: nn.Module) -> None:
    """Put every adapter into its layer's own weights and drop it; the model has its old names."""
    for name, layer in adapted_layers(model).items():
        layer.merge(safe_merge=True)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.get_base_layer())


def save_adapters(
    model: nn.Module, folder: Path, lora: Lora, weights: Mapping[str, Tensor] | None = None
) -> None:
    """Adapters, and all else that trains, without the frozen base: a few megabytes.

    ``adapter_model.safetensors`` holds tensors by the model's own names, taken out of ``weights``
    where the model's own are sharded or in a low precision.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: (parameter if weights is None else weights[name]).detach().cpu().contiguous()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    temporary = folder / f".{WEIGHTS}"
    save_file(tensors, temporary)
    temporary.replace(folder / WEIGHTS)
    settings = {"lora": lora.model_dump(mode="json"), "layers": list(adapted_layers(model))}
    (folder / SETTINGS).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf8")


# --- the table


@dataclass(slots=True)
class Row:
    """Parameters of one part that are treated alike."""

    part: str
    count: int  # numbers, not tensors
    tensors: int
    state: str  # trained, frozen or lora
    lr_scale: float | None = None  # None: frozen, or no optimizer given
    weight_decay: float | None = None


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
        part, state = name.split(".")[0], "lora" if is_adapter(name) else "trained"
        stepped = optimizer_groups is None or id(parameter) in settings
        if not (parameter.requires_grad and stepped):
            state = "frozen"
        setting = (None, None) if state == "frozen" else settings.get(id(parameter), (None, None))
        row = rows.setdefault((part, state, *setting), Row(part, 0, 0, state, *setting))
        row.count += parameter.numel()
        row.tensors += 1
    parts = [name for name, _ in model.named_children()]
    parts += [name for name, _ in model.named_parameters(recurse=False)]
    return sorted(rows.values(), key=lambda row: (parts.index(row.part), row.state == "frozen"))


def totals(rows: Sequence[Row]) -> tuple[int, int]:
    """(trained, frozen) numbers."""
    trained = sum(row.count for row in rows if row.state != "frozen")
    return trained, sum(row.count for row in rows) - trained


def format_table(rows: Sequence[Row]) -> str:
    """The table as text, one line a row and one for the totals."""
    cells = [("part", "parameters", "tensors", "state", "lr scale", "weight decay")]
    for row in rows:
        scale, decay = (
            "" if value is None else f"{value:g}" for value in (row.lr_scale, row.weight_decay)
        )
        cells.append((row.part, f"{row.count:,}", str(row.tensors), row.state, scale, decay))
    columns = [
        [f"{cell:{side}{max(map(len, column))}}" for cell in column]
        for side, column in zip("<>><>>", zip(*cells, strict=True), strict=True)
    ]
    lines = ["  ".join(line).rstrip() for line in zip(*columns, strict=True)]
    trained, frozen = totals(rows)
    return "\n".join([*lines, f"{trained:,} trained, {frozen:,} frozen"])
