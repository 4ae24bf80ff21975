"""What a packer reads from: a dataset of a YAML, a folder of a named format, or one that shows its
format by what lies in it."""

from __future__ import annotations

import argparse
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import yaml

from engine import registry
from engine.config.load import load
from engine.config.schema import Data
from engine.data.sources import BUILT_IN, FORMATS, open_source
from engine.errors import UserError
from engine.types import Source

_IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")
_LOOKED_AT = 1000  # files


def open_origin(arguments: argparse.Namespace, split: str) -> tuple[Source, dict[str, Any]]:
    """The split, and all options of its dataset. Raises UserError for what cannot be opened."""
    name, data = _data(arguments)
    chosen: Literal["train", "valid"] = "valid" if split == "valid" else "train"
    source = open_source(name, chosen, data, key="SOURCE")
    return source, {"name": name, "data_path": data.data_path, **data.datasets.get(name, {})}


def _data(arguments: argparse.Namespace) -> tuple[str, Data]:
    options = dict(_option(text) for text in arguments.option)
    if arguments.valid_share is not None:
        options["valid_share"] = arguments.valid_share
    if arguments.cfg is not None:
        data = load(arguments.cfg).data
        known = {**data.datasets}
        if options:
            if arguments.source not in known:
                raise UserError(f"--option needs {arguments.source!r} to be under data.datasets")
            known[arguments.source] = {**known[arguments.source], **options}
        return arguments.source, data.model_copy(update={"datasets": known})
    if arguments.source in BUILT_IN and not Path(arguments.source).exists():
        return arguments.source, Data()
    root = Path(arguments.source)
    if not root.is_dir():
        what = "is a file, not a folder" if root.exists() else "is no folder"
        raise UserError(
            f"{root} {what}; name a dataset's folder, one of {', '.join(BUILT_IN)}, or with "
            "--cfg=FILE a dataset of that configuration"
        )
    form = arguments.format or shown_format(root)
    registry.find(FORMATS, form, key=None)
    if arguments.valid_share is not None and form != "sidecar":
        raise UserError(f"--valid-share is for images with texts beside them, not format {form}")
    name = root.resolve().name or "source"
    dataset = {"format": form, "root": str(root.resolve()), **options}
    return name, Data(data_path=str(root.resolve().parent), datasets={name: dataset})


def _option(text: str) -> tuple[str, Any]:
    name, mark, value = text.partition("=")
    if not mark or not name:
        raise UserError(f"--option {text!r} is not of the form name=value")
    try:
        return name, yaml.safe_load(value)
    except yaml.YAMLError:
        raise UserError(f"--option {text!r}: {value!r} is no YAML value") from None


def shown_format(root: Path) -> str:
    """The format of a folder by what lies in it. Raises UserError where nothing tells."""
    for pattern, form in (
        ("*_anno.csv*", "csv"),
        ("*.tar", "webdataset"),
        ("*/*.tar", "webdataset"),
        ("dataset_dict.json", "huggingface"),
        ("state.json", "huggingface"),
        ("*.parquet", "parquet"),
        ("*_anno.tsv", "csv"),
    ):
        if next(root.glob(pattern), None) is not None:
            return form
    files = (path for path in root.rglob("*") if path.suffix.lower() in _IMAGES)
    if any(path.with_suffix(".txt").is_file() for path in islice(files, _LOOKED_AT)):
        return "sidecar"
    there = ", ".join(sorted(path.name for path in islice(root.iterdir(), 5))) or "nothing"
    known = ", ".join(sorted(registry.names(FORMATS)))
    raise UserError(
        f"{root} does not show its format (there: {there}); name it as --format F, one of {known}"
    )
