"""Options of parts from outside the tree, validated like every other key.

A module that is loaded by its dotted name (a loss, a task, a mode, …) may define its own section,

    class Options(Section):
        margin: PositiveFloat = 0.2

which a YAML sets under the module's name,

    options:
      my_project.losses.triplet: {margin: 0.3}

and which its ``build`` (of a mode ``run``) is given as the keyword ``options``. Formats of datasets
take theirs beside ``format``, as all formats do.
"""

from __future__ import annotations

import importlib
from collections.abc import Collection, Sequence
from operator import attrgetter
from typing import Any

from engine.config.explain import validate_at
from engine.config.rules import PARTS
from engine.config.schema import Config
from engine.config.section import is_section
from engine.registry import nearest

_MORE_PARTS = (
    *("model.decoder.name", "model.decoder.tokenizer.name", "eval.extra"),
    *("transforms.train_transforms", "transforms.valid_transforms"),
)


def with_options(config: Config, named: Sequence[str] | None) -> tuple[Config, dict[str, str]]:
    """``config`` with each module's options as its own class, defaults filled in; and a message by
    each faulty key.

    Args:
        named: the task and the mode of this run. None: they are not known, since another run's
            configuration is read; then only what is given is validated, where it can be imported.
    """
    parts = list(config.options) if named is None else _outside_parts(config, named)
    valid, faults = config.options.copy(), dict[str, str]()
    for name in dict.fromkeys([*parts, *config.options]):
        key = f"options.{name}"
        form = _form(name, parts)
        if isinstance(form, str):
            if named is not None and name in config.options:
                faults[key] = form
        elif not is_section(form):
            faults[key] = (
                f"the class Options of {name!r} must derive from engine.config.section.Section"
            )
        else:
            found, wrong = validate_at(key, form, config.options.get(name, {}))
            faults |= wrong
            valid |= {} if found is None else {name: found}
    return config.model_copy(update={"options": valid}), faults


def _outside_parts(config: Config, named: Sequence[str]) -> list[str]:
    """Modules from outside that a run uses, by the configuration or ``named`` beside it."""
    found = list(named)
    for key in (*PARTS, *_MORE_PARTS):
        value = attrgetter(key)(config)
        found += [value] if isinstance(value, str) else value
    return [name for name in found if "." in name]


def _form(name: str, parts: Sequence[str]) -> Any:
    """The class ``Options`` of a module; a message where it has none."""
    import engine.torchvision_ops  # noqa: F401  before timm and torchvision, which it may import

    if name not in parts:
        hint = nearest(name, list(parts)) if parts else "no part of it is from outside"
        return f"this run does not use the module {name!r}; {hint}, or remove its options"
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        return f"cannot import {name!r}: {error}"
    absent = f"the module {name!r} takes no options: it has no class Options; remove them"
    return getattr(module, "Options", absent)


def override_path(path: Sequence[str], known: Collection[str], is_mapping: bool) -> list[str]:
    """``options.my.module.key`` of an override as ``[options, my.module, key]``.

    The module is the longest of the ``known`` names, else all but the last part, or all of it for a
    value that is a mapping.
    """
    _, *rest = path
    known_ends = (end for end in range(len(rest), 0, -1) if ".".join(rest[:end]) in known)
    end = next(known_ends, max(1, len(rest) - (not is_mapping)))
    return ["options", ".".join(rest[:end]), *rest[end:]]
