"""A folder of the ``datasets`` library on disk, read without that library.

Either what ``save_to_disk`` wrote (a ``DatasetDict``, or one ``Dataset``), or Arrow files of its
cache, or Parquet files as the hub keeps them (``data/train-00000-of-00004.parquet``).
"""

from __future__ import annotations

import glob
import json
import re
from pathlib import Path
from typing import Any

from engine import registry
from engine.data.tables.arrow import (
    TableOptions,
    choose_columns,
    open_arrow,
    open_stream,
    uncompressed,
)
from engine.data.tables.paths import ImageRoot, check_root, listed
from engine.errors import UserError
from engine.types import BadSample, Source

_SPLITS = {"train": ("train",), "valid": ("validation", "valid", "val", "dev")}


class Config(TableOptions):
    """Options of ``format: huggingface``; folders are relative to ``root``."""

    train: str | None = None  # the split's name there; default: train
    valid: str | None = None  # default: validation, valid, val or dev


def build(config: Config, *, name: str, split: str, cache_dir: Path) -> Source:
    """Open one split. Raises UserError, naming the path, for what is missing or malformed."""
    root, own = config.root, config.valid if split == "valid" else config.train
    check_root(root, dataset=name)
    splits = (own,) if own else _SPLITS[split]
    key = f"data.datasets.{name}.{split}"
    paths = _saved(root, splits, key) or _matching(root, splits, ".arrow")
    if not paths:
        return _parquet(config, splits, name=name, split=split, cache_dir=cache_dir)
    schema = open_stream(paths[0])[1]
    columns = choose_columns(schema, paths[0], config)
    files = [uncompressed(path, cache_dir=cache_dir) for path in paths]
    return open_arrow(config, paths, columns, files, name=name, split=split, cache_dir=cache_dir)


def _saved(root: Path, splits: tuple[str, ...], key: str) -> list[Path]:
    """Arrow files of a folder that ``save_to_disk`` wrote; none of any other folder."""
    if (root / "dataset_dict.json").is_file():
        there = _json(root / "dataset_dict.json").get("splits")
        named = [split for split in there if isinstance(split, str)] if there else []
        split = next((split for split in splits if split in named), None)
        if split is None or Path(split).name != split:
            raise UserError(
                f"{root} has no split {' or '.join(splits)}; its splits: {', '.join(named)}. "
                f"Name one as {key.rpartition('.')[2]}: SPLIT",
                key=key,
            )
        return _data_files(root / split)
    if (root / "state.json").is_file():
        return _data_files(root)
    return next((_data_files(root / s) for s in splits if (root / s / "state.json").is_file()), [])


def _data_files(folder: Path) -> list[Path]:
    path = folder / "state.json"
    state = _json(path)
    if state.get("_indices_data_files") or state.get("_indices_files"):
        raise UserError(f"{folder} was saved with a selection of rows; flatten_indices() it first")
    try:
        found = [ImageRoot(folder).path(str(file["filename"])) for file in state["_data_files"]]
    except (KeyError, TypeError, BadSample) as error:
        raise UserError(f"{path} does not list its data files as filenames: {error}") from None
    if not found:
        raise UserError(f"{path} lists no data files")
    return found


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a JSON object")
    return value


def _matching(root: Path, splits: tuple[str, ...], ending: str) -> list[Path]:
    """Files in ``root`` whose name or folder is that of a split, of the first that has any."""
    files = sorted(
        path
        for path in root.glob(f"**/*{ending}")
        if not any(part.startswith(".") for part in path.relative_to(root).parts)
    )
    for split in splits:
        named = re.compile(rf"(^|[-_./]){re.escape(split)}([-_./]|$)")
        if found := [path for path in files if named.search(str(path.relative_to(root)))]:
            return found
    return []


def _parquet(
    config: Config, splits: tuple[str, ...], *, name: str, split: str, cache_dir: Path
) -> Source:
    paths = _matching(config.root, splits, ".parquet")
    if not paths:
        raise UserError(
            f"dataset {name!r} has no split {' or '.join(splits)} in {config.root}; tables in that "
            f"folder: {listed(config.root, ('.arrow', '.parquet', 'state.json'))}. Name one as "
            f"{split}: SPLIT",
            key=f"data.datasets.{name}.{split}",
        )
    # Parquet is read through the registry: formats do not import one another.
    parquet = registry.find("data/formats", "parquet")
    options = config.model_dump(exclude={"train", "valid"})
    files = [glob.escape(str(path.relative_to(config.root))) for path in paths]
    own = parquet.Config(**options, **{split: files})
    return parquet.build(own, name=name, split=split, cache_dir=cache_dir)
