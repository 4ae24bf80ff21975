"""Optimizers: which class, and which of its groups each parameter belongs to."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from engine.config.schema import Optim, ParamGroup
from engine.errors import UserError
from engine.models.parameters import is_adapter, is_token_row
from engine.registry import nearest
from engine.train.schedules import refuse_unknown

Kind = Callable[..., torch.optim.Optimizer]  # a class: they differ in what they take
_UNFIT = {
    "LBFGS": "it evaluates the loss several times a step",
    "SparseAdam": "it takes sparse gradients only",
    "adahessian": "it takes second derivatives",
}
_TOWERS = ("image_encoder", "text_encoder")
_LAYER = re.compile(r"(?:^|\.)(?:blocks?|layers?|resblocks|stages|h)\.?(\d+)(?=\.)")
_EMBEDDING = re.compile(
    r"embed|_token|\bpos|patch|stem|norm_pre|ln_pre|\bwte|\bwpe|\bshared|(?:^|\.)(?:conv|bn)1\b"
)


def build(model: nn.Module, config: Optim) -> torch.optim.Optimizer:
    """The optimizer of ``model``'s trainable parameters; each group carries its ``lr_scale``.

    Freezes what is not to train. Biases, norms and scalars (at most one dimension, or one element)
    never decay. Raises UserError for an unknown class or param, and for a pattern that finds no
    parameter.
    """
    kind = _optimizer_class(config.name)
    known = dict(list(inspect.signature(kind).parameters.items())[1:])  # the first is params
    param = _checked_param(known, config)
    freeze(model, config)
    default = known.get("weight_decay")
    decay = None if default is None else param.get("weight_decay", default.default)
    groups = _groups(model, config, decay)
    if not groups:
        raise UserError("every parameter is frozen: nothing is left to train", key="optim.groups")
    try:
        if "fused" in known and not {"fused", "foreach", "capturable"} & param.keys():
            with suppress(RuntimeError):  # no fused kernel for this device or format
                return kind(groups, lr=config.lr.init, **param, fused=True)
        return kind(groups, lr=config.lr.init, **param)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{config.name}: {error}", key="optim.param") from error


def freeze(model: nn.Module, config: Optim) -> None:
    """Leave out of training what the first group that matches says, or ``keys_finetune`` omits.

    Where adapters train, their layers' own weights do not. Raises UserError for a key without
    effect.
    """
    names = [name for name, _ in model.named_parameters()]
    for position, wanted in enumerate(config.keys_finetune):
        if not any(wanted in name for name in names):
            message = f"no parameter's name contains {wanted!r}; {_parts(names)}"
            raise UserError(message, key=f"optim.keys_finetune.{position}")
    for name, parameter in model.named_parameters():
        group = _first_match(name, config.groups)
        frozen = group is not None and (
            group.freeze
            or group.train == "freeze"
            or (group.train == "lora" and not is_adapter(name))
            or (group.train == "rows" and not is_token_row(name))
        )
        listed = any(wanted in name for wanted in config.keys_finetune)
        if frozen or (config.keys_finetune and not listed and not is_adapter(name)):
            parameter.requires_grad_(False)


def layer_depths(names: Iterable[str]) -> dict[str, float]:
    """How far below its tower's head each parameter is, in layers; 0 outside the towers.

    Layers are recognised by names such as ``blocks.3.``, ``layer.2.`` or ``stages.1.blocks.0.``;
    embeddings are below the first layer, and whatever follows the last one is the head.
    """
    depths = dict.fromkeys(names, 0.0)
    for tower in _TOWERS:
        inside = {name: name.split(f"{tower}.", 1)[1] for name in depths if f"{tower}." in name}
        numbers = {name: [int(n) for n in _LAYER.findall(own)] for name, own in inside.items()}
        layers = sorted({tuple(layer) for layer in numbers.values() if layer})
        for name, own in inside.items():
            if numbers[name]:
                depths[name] = float(len(layers) - layers.index(tuple(numbers[name])))
            elif _EMBEDDING.search(own):
                depths[name] = float(len(layers) + 1)
    return depths


def _groups(model: nn.Module, config: Optim, default_decay: float | None) -> list[dict[str, Any]]:
    """Trainable parameters by equal settings, in the model's order; None: no decay at all."""
    every = dict(model.named_parameters())
    chosen = {name: _first_match(name, config.groups) for name in every}
    _refuse_unused(chosen, config.groups)
    depths = layer_depths(every)
    merged: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in every.items():
        if not parameter.requires_grad:
            continue
        group = chosen[name] or ParamGroup(pattern="")
        decay = group.weight_decay if group.weight_decay is not None else default_decay or 0.0
        if parameter.ndim <= 1 or parameter.numel() == 1:
            decay = 0.0
        scale = group.lr_scale * config.layer_decay ** depths[name]
        settings: dict[str, Any] = {"params": [], "lr": config.lr.init * scale, "lr_scale": scale}
        if default_decay is not None:
            settings["weight_decay"] = decay
        merged.setdefault((scale, decay), settings)["params"].append(parameter)
    return list(merged.values())


def _first_match(name: str, groups: Sequence[ParamGroup]) -> ParamGroup | None:
    return next((group for group in groups if re.search(group.pattern, name)), None)


def _refuse_unused(chosen: dict[str, ParamGroup | None], groups: Sequence[ParamGroup]) -> None:
    """A pattern without effect is an error: a typo would train what was meant to be frozen."""
    for position, group in enumerate(groups):
        if any(match is group for match in chosen.values()):
            continue
        found = [name for name in chosen if re.search(group.pattern, name)]
        reason = (
            f"finds only parameters that an earlier group has taken ({found[0]}, …): move it up"
            if found
            else f"finds no parameter; {_parts(chosen)}"
        )
        raise UserError(f"the pattern {group.pattern!r} {reason}",
                        key=f"optim.groups.{position}.pattern")  # fmt: skip


def _parts(names: Iterable[str]) -> str:
    parts = sorted({name.split(".", 1)[0] for name in names})
    return f"the model's parts are {', '.join(parts)}"


def _optimizer_class(name: str) -> Kind:
    """A class of torch.optim, with or without its package; LARS; one of timm's, by its name there
    (``lamb``); or a class by its dotted name (``timm.optim.Lion``)."""
    known = {
        key: value
        for key, value in vars(torch.optim).items()
        if isinstance(value, type) and value is not torch.optim.Optimizer
    }
    module, _, bare = name.rpartition(".")
    if bare in _UNFIT and module in ("", "torch.optim"):
        raise UserError(f"{bare} cannot be used: {_UNFIT[bare]}", key="optim.name")
    if bare in known and module in ("", "torch.optim"):
        return known[bare]
    # timm takes a while to import, and no other optimizer needs it
    import engine.torchvision_ops  # noqa: F401  before timm, which imports torchvision

    if module not in ("", "torch.optim"):
        return _from_outside(name, module, bare)
    from timm.optim import get_optimizer_class, list_optimizers  # isort: skip
    from engine.train.lars import LARS  # isort: skip

    if bare == "LARS":
        return LARS
    timms = [str(found) for found in list_optimizers()]
    if bare not in timms:
        hint = nearest(bare, [key for key in (*known, "LARS", *timms) if key not in _UNFIT])
        raise UserError(f"no optimizer is called {name!r}; {hint}", key="optim.name")
    try:
        return get_optimizer_class(bare)
    except (ImportError, AssertionError) as error:  # it needs another library, or a GPU
        raise UserError(f"{bare} cannot be used: {error}", key="optim.name") from error


def _from_outside(name: str, module: str, bare: str) -> Kind:
    try:
        kind = getattr(importlib.import_module(module), bare)
    except (ImportError, AttributeError) as error:
        message = f"cannot import the optimizer {name!r}: {error}"
        raise UserError(message, key="optim.name") from error
    if not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)):
        raise UserError(f"{name!r} is not a torch.optim.Optimizer", key="optim.name")
    return kind


def _checked_param(known: dict[str, inspect.Parameter], config: Optim) -> dict[str, Any]:
    """``optim.param`` as the class takes it: lists (of betas) as tuples, no unknown name."""
    if "lr" in config.param:
        raise UserError("the learning rate is set by optim.lr.init", key="optim.param.lr")
    usable = [name for name in known if name != "lr"]
    refuse_unknown(config.name, config.param, usable, "optim.param")
    return {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in config.param.items()
    }
