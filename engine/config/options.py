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

from engine.config.explain import validate
from engine.config.rules import PARTS
from engine.config.schema import Config
from engine.config.section import Section, is_section
from engine.registry import nearest

_MORE_PARTS = (
    *("model.decoder.name", "model.decoder.tokenizer.name", "eval.extra"),
    *("transforms.train_transforms", "transforms.valid_transforms"),
)


def outside_parts(config: Config, named: Sequence[str] = ()) -> list[str]:
    """Modules from outside that a run uses, by the configuration or ``named`` beside it."""
    found = list(named)
    for key in (*PARTS, *_MORE_PARTS):
        value = attrgetter(key)(config)
        found += [value] if isinstance(value, str) else value
    return list(dict.fromkeys(name for name in found if "." in name))


def with_options(config: Config, named: Sequence[str] | None) -> tuple[Config, dict[str, str]]:
    """``config`` with each module's options as its own class, defaults filled in; and a message by
    each faulty key.

    Args:
        named: the task and the mode of this run. None: they are not known, since another run's
            configuration is read; then only what is given is validated, where it can be imported.
    """
    parts, faults = outside_parts(config, named or ()), dict[str, str]()
    modules = dict.fromkeys(parts if named is not None else config.options)
    forms = {name: form for name in modules if (form := _form(name)) is not None}
    if named is not None:
        unknown = (name for name in config.options if name not in forms)
        faults |= {f"options.{name}": _refusal(name, parts) for name in unknown}
    valid = {}
    for name, form in forms.items():
        if not is_section(form):
            faults[f"options.{name}"] = (
                f"the class Options of {name!r} must derive from engine.config.section.Section"
            )
            continue
        found, wrong = validate(form, config.options.get(name, {}), f"options.{name}")
        faults |= wrong
        if found is not None:
            valid[name] = found
    return config.model_copy(update={"options": {**config.options, **valid}}), faults


def override_path(path: Sequence[str], known: Collection[str], is_mapping: bool) -> list[str]:
    """``options.my.module.key`` of an override as ``[options, my.module, key]``.

    The module is the longest of the ``known`` names, else all but the last part, or all of it for a
    value that is a mapping.
    """
    _, *rest = path
    ends = [end for end in range(len(rest), 0, -1) if ".".join(rest[:end]) in known]
    end = ends[0] if ends else max(1, len(rest) - (not is_mapping))
    return ["options", ".".join(rest[:end]), *rest[end:]]


def _form(name: str) -> type[Section] | None:
    """The class ``Options`` of a module; None without it, or where the module does not load."""
    import engine.torchvision_ops  # noqa: F401  before timm and torchvision, which it may import

    try:
        module = importlib.import_module(name)
    except ImportError:
        return None  # said when the part is built, or for what ``options`` names
    return getattr(module, "Options", None)


def _refusal(name: str, parts: list[str]) -> str:
    if name not in parts:
        hint = nearest(name, parts) if parts else "no part of it is from outside"
        return f"this run does not use the module {name!r}; {hint}, or remove its options"
    try:
        importlib.import_module(name)
    except ImportError as error:
        return f"cannot import {name!r}: {error}"
    return f"the module {name!r} takes no options: it has no class Options; remove them"
