"""Datasets by name: configured under ``data.datasets``, lying in a folder, or built in."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from engine import registry
from engine.config import schema
from engine.errors import UserError
from engine.types import Source

FORMATS = "data/formats"
BUILT_IN: dict[str, dict[str, Any]] = {
    "shapes": {"format": "shapes", "style": "flat"},
    "shapes_sketch": {"format": "shapes", "style": "sketch"},
}


def open_source(
    name: str, split: Literal["train", "valid"], data: schema.Data, *, key: str
) -> Source:
    """One split of the dataset ``name``, which the configuration uses at ``key``.

    Looked up in ``data.datasets``, then as the CSV folder ``data_path/name``, then among the
    built-in datasets. Raises UserError for an unknown name, format or option.
    """
    root = Path(data.data_path)
    if name in data.datasets:
        options = data.datasets[name]
    elif (root / name).is_dir():
        options = {"format": "csv"}
    elif name in BUILT_IN:
        options = BUILT_IN[name]
    else:
        raise UserError(_unknown(name, data), key=key)
    at = f"data.datasets.{name}"
    if "format" not in options:
        known = sorted(registry.names(FORMATS))
        raise UserError(f"dataset {name!r} has no format; known: {', '.join(known)}", key=at)
    module = registry.find(FORMATS, str(options["format"]), key=f"{at}.format")
    config = _validated(module.Config, options, root, name)
    try:
        return module.build(config, name=name, split=split, cache_dir=cache_dir())
    except UserError as error:
        error.key = error.key or key
        raise


def cache_dir() -> Path:
    """Where tables are kept whose own folder cannot be written."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "engine"


def _validated(form: type[schema.Section], options: dict, root: Path, name: str) -> schema.Section:
    """A format's own options, with ``root`` made relative to ``data_path``."""
    own = {option: value for option, value in options.items() if option != "format"}
    try:
        return form.model_validate({**own, "root": root / str(own.get("root", name))})
    except ValidationError as error:
        first = error.errors()[0]
        option = ".".join(str(part) for part in first["loc"])
        message = f"dataset {name!r}: {option}: {first['msg']}"
        if first["type"] == "extra_forbidden":
            hint = registry.nearest(option, sorted(form.model_fields))
            message = f"dataset {name!r}: format {options['format']} has no {option!r}; {hint}"
        raise UserError(message, key=f"data.datasets.{name}.{option}") from error


def _unknown(name: str, data: schema.Data) -> str:
    root = Path(data.data_path)
    there = sorted(p.name for p in root.glob("[!.]*/")) if root.is_dir() else []
    known = sorted({*data.datasets, *there, *BUILT_IN})
    where = f"folders in {root}: {', '.join(there) or 'none'}"
    configured = f"data.datasets: {', '.join(data.datasets) or 'none'}"
    return (
        f"no dataset is called {name!r}; {registry.nearest(name, known)} "
        f"({where}; {configured}; built in: {', '.join(BUILT_IN)})"
    )
