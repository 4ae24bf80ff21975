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
from engine.data.tables.arrow import TableOptions, open_arrow, open_stream, uncompressed
from engine.data.tables.paths import ImageRoot, SplitFolder
from engine.errors import UserError
from engine.types import BadSample, Source

_SPLITS = {"train": ("train",), "valid": ("validation", "valid", "val", "dev")}


class Config(TableOptions):
    """Options of ``format: huggingface``; folders are relative to ``root``."""

    train: str | None = None  # the split's name there; default: train
    valid: str | None = None  # default: validation, valid, val or dev


def build(config: Config, *, name: str, split: str, cache_dir: Path) -> Source:
    """Open one split. Raises UserError, naming the path, for what is missing or malformed."""
    folder = SplitFolder(config, name, split)
    own = folder.of(config.train, config.valid)
    splits = (own,) if own else _SPLITS[split]
    paths = _saved(folder, splits) or _matching(config.root, splits, ".arrow")
    if paths:
        return open_arrow(
            folder,
            paths,
            open_stream(paths[0])[1],
            lambda path, _: uncompressed(path, cache_dir=cache_dir),
            cache_dir=cache_dir,
        )
    paths = _matching(config.root, splits, ".parquet")
    if not paths:
        raise folder.error(
            f"has no split {' or '.join(splits)} in {config.root}; tables in that folder: "
            f"{folder.listed(('.arrow', '.parquet', 'state.json'))}. Name one as {split}: SPLIT",
            split,
        )
    # Parquet is read through the registry: formats do not import one another.
    parquet = registry.find("data/formats", "parquet")
    options = config.model_dump(exclude={"train", "valid"})
    files = [glob.escape(str(path.relative_to(config.root))) for path in paths]
    read = parquet.Config(**options, **{split: files})
    source: Source = parquet.build(read, name=name, split=split, cache_dir=cache_dir)
    return source


def _saved(folder: SplitFolder, splits: tuple[str, ...]) -> list[Path]:
    """Arrow files of a folder that ``save_to_disk`` wrote; none of any other folder."""
    root = folder.root
    if (root / "dataset_dict.json").is_file():
        there = _json(root / "dataset_dict.json").get("splits")
        named = [split for split in there if isinstance(split, str)] if there else []
        split = next((split for split in splits if split in named), None)
        if split is None or Path(split).name != split:
            raise folder.error(
                f"in {root} has no split {' or '.join(splits)}; its splits: {', '.join(named)}. "
                f"Name one as {folder.split}: SPLIT",
                folder.split,
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
