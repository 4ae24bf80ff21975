"""Low-rank adapters (LoRA, arXiv 2106.09685) by peft: added, merged, saved alone."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

import engine.torchvision_ops  # noqa: F401  before transformers, which imports torchvision

import transformers  # isort: skip
from peft import LoraConfig, inject_adapter_in_model  # isort: skip
from peft.tuners.lora import LoraLayer  # isort: skip
from engine.config.schema import Lora
from engine.errors import UserError
from engine.models.parameters import is_adapter

WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"
_LAYERS = (nn.Linear, nn.Conv2d, nn.Embedding, transformers.pytorch_utils.Conv1D)


def add_lora(model: nn.Module, patterns: Sequence[str], earlier: Sequence[str], lora: Lora) -> None:
    """Add adapters to the layers whose weights' names a pattern finds; their own weights freeze.

    ``earlier`` patterns take parameters away from ``patterns``: of ordered groups the first that
    matches rules. What else trains stays as it is. Raises UserError where nothing is found.
    """
    targets = [
        name
        for name, module in model.named_modules()
        if isinstance(module, _LAYERS)
        and any(re.search(pattern, f"{name}.weight") for pattern in patterns)
        and not any(re.search(pattern, f"{name}.weight") for pattern in earlier)
    ]
    if not targets:
        raise UserError(
            f"train: lora finds no layer by {' or '.join(map(repr, patterns))}; layers are linear, "
            f"such as {', '.join(_some_layers(model))}",
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
        base = name.replace(".base_layer.", ".")
        adapted = base != name
        parameter.requires_grad_(is_adapter(name) or (base in trained and not adapted))


def _some_layers(model: nn.Module) -> list[str]:
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return [f"{name}.weight" for name in names[:: max(1, len(names) // 3)][:3]]


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    """Names and layers that have adapters."""
    return ((n, m) for n, m in model.named_modules() if isinstance(m, LoraLayer))


def merge(model: nn.Module) -> None:
    """Put every adapter into its layer's own weights and drop it; the model has its old names."""
    for name, layer in list(adapted_layers(model)):
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
    targets = [name for name, _ in adapted_layers(model)]
    settings: dict[str, Any] = {"lora": lora.model_dump(mode="json"), "layers": targets}
    (folder / SETTINGS).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf8")
