"""Datasets by name: configured under ``data.datasets``, a folder, or built in."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from pydantic import PositiveInt

from engine import registry
from engine.config import schema
from engine.config.explain import Form, validate
from engine.config.section import NonNegativeInt
from engine.data.cache import cache_folder
from engine.data.groups import group_rows
from engine.data.stream.source import Stream
from engine.data.views import Flattened, JoinedCaptions, OneCaption, Repeated, Subset
from engine.errors import UserError
from engine.tools.shapes import folder as drawn
from engine.types import Source

FORMATS = "data/formats"
BUILT_IN: dict[str, dict[str, Any]] = {
    "shapes": {"format": "shapes", "style": "flat"},
    "shapes_sketch": {"format": "shapes", "style": "sketch"},
    "shapes_questions": {"format": "shapes", "texts": "questions"},
}


Split = Literal["train", "valid"]


class RowOptions(schema.Section):
    """Options of every dataset beside its format's own: which rows there are.

    ``cap``, ``repeat``, ``length`` and ``captions: random`` are about an epoch of training: the
    valid split has all rows. ``captions: joined`` is of both.
    """

    captions: Literal["all", "random", "joined"] = "all"  # of an image with several rows
    caption_separator: str = " "  # between joined captions
    cap: PositiveInt | None = None  # at most so many rows, chosen at random once for all
    cap_seed: NonNegativeInt = 0  # which rows those are
    repeat: PositiveInt = 1  # so many times an epoch every row
    length: PositiveInt | None = None  # training rows that there must be, before all of these


def open_dataset(
    name: str, split: Split, data: schema.Data, *, key: str, inside: tuple[str, ...] = ()
) -> Source | Stream:
    """One split of the dataset ``name``, which the configuration uses at ``key``.

    Looked up in ``data.datasets``, then as the CSV folder ``data_path/name``, then among the
    built-in datasets. It may be a part of the datasets ``inside``, outermost first. Raises
    UserError for an unknown name, format or option.
    """
    if name in inside:
        raise UserError(f"dataset {name!r} contains itself: {' → '.join((*inside, name))}", key=key)
    options = _options(name, data, key)
    at = f"data.datasets.{name}"
    if "format" not in options:
        known = sorted(registry.names(FORMATS))
        raise UserError(f"dataset {name!r} has no format; known: {', '.join(known)}", key=at)
    module = registry.find(FORMATS, str(options["format"]), key=f"{at}.format")
    config, rows = _validated(module.Config, options, Path(data.data_path), name)
    more: dict[str, Any] = {}
    if "parts" in module.Config.model_fields:  # a format that is made of other datasets

        def open_part(part: str) -> Source | Stream:
            above = (*inside, name)
            return open_dataset(part, split, data, key=f"{at}.parts", inside=above)

        more["open_part"] = open_part
    try:
        opened = module.build(config, name=name, split=split, cache_dir=cache_dir(), **more)
        _check_options(rows, name)
        if isinstance(opened, Stream):
            _check_stream(opened, rows, data)
            return opened
        if data.conversations == "flatten" and opened.has_conversations:
            opened = Flattened(opened)
        return _with_rows(opened, rows, name, split, getattr(config, "root", None))
    except UserError as error:
        if not error.key or name not in data.datasets:  # a bare name has no options to point at
            error.key = key
        raise


def open_source(name: str, split: Split, data: schema.Data, *, key: str) -> Source:
    """``open_dataset`` where rows are needed. Raises UserError for a streamed dataset too."""
    opened = open_dataset(name, split, data, key=key)
    if isinstance(opened, Stream):
        raise UserError(
            f"dataset {name!r} is streamed for training, and cannot be read by row; "
            "copy its shards to this machine for that, or name them as a validation split",
            key=key,
        )
    return opened


def row_options(name: str, data: schema.Data) -> dict[str, Any]:
    """The options of a dataset that its rows and their order depend on, other than defaults."""
    own = _options(name, data, "data.datasets")
    form = registry.find(FORMATS, str(own["format"])).Config.model_fields
    general = {option: own[option] for option in _general(form) & set(own)}
    chosen = RowOptions.model_validate(general).model_dump(exclude_defaults=True)
    chosen.pop("length", None)
    if "parts" in form:
        chosen["parts"] = {part: row_options(part, data) for part in own["parts"]}
    return chosen


def _general(form: Mapping[str, object]) -> set[str]:
    """Options that are every dataset's; one that the format itself declares is the format's."""
    return set(RowOptions.model_fields) - set(form)


def _check_stream(stream: Stream, options: RowOptions, data: schema.Data) -> None:
    """Raises UserError for what needs rows that can be counted and chosen."""
    name = stream.name
    if data.conversations == "flatten":
        raise UserError(
            f"dataset {name!r} is streamed, and its conversations cannot be counted question by "
            "question: write data.conversations: turns, or copy the shards to this machine",
            key="data.conversations",
        )
    if asked := options.model_dump(exclude_defaults=True):
        raise UserError(
            f"dataset {name!r} is streamed: {', '.join(asked)} needs rows that can be counted and "
            "chosen; leave it out, or copy the shards to this machine",
            key=f"data.datasets.{name}.{next(iter(asked))}",
        )


def _check_options(options: RowOptions, name: str) -> None:
    """Raises UserError for an option that has no effect without another."""
    given = options.model_dump(exclude_defaults=True)
    for option, needed in (("caption_separator", "captions: joined"), ("cap_seed", "cap: N")):
        there = options.cap is not None if option == "cap_seed" else options.captions == "joined"
        if option in given and not there:
            raise UserError(
                f"dataset {name!r}: {option} has no effect without {needed}; add that, or leave "
                f"{option} out",
                key=f"data.datasets.{name}.{option}",
            )


def _with_rows(
    source: Source, options: RowOptions, name: str, split: Split, root: Path | None
) -> Source:
    """The rows of ``source`` that ``options`` ask for."""
    training = split == "train"
    if training and options.length not in (None, len(source)):
        raise UserError(
            f"dataset {name!r} has {len(source)} training rows, but its length is given as "
            f"{options.length}; correct it, or leave it out: rows are counted once and remembered",
            key=f"data.datasets.{name}.length",
        )
    if options.captions == "joined" or (options.captions == "random" and training):
        # Beside the dataset where that can be written, as its tables are.
        folder = cache_dir() if root is None else cache_folder(root / name, cache_dir())
        groups = group_rows(source, folder)
        if options.captions == "joined":
            source = JoinedCaptions(source, groups, options.caption_separator)
        else:
            source = OneCaption(source, groups)
    if training and options.cap is not None and options.cap < len(source):
        source = Subset(source, options.cap, options.cap_seed)
    if training and options.repeat > 1:
        source = Repeated(source, options.repeat)
    return source


def cache_dir() -> Path:
    """Where tables are kept whose own folder cannot be written."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "engine"


def _options(name: str, data: schema.Data, key: str) -> dict[str, Any]:
    if name in data.datasets:
        return data.datasets[name]
    folder = Path(data.data_path) / name
    if folder.is_dir():
        options = drawn.read_options(folder)
        if options is None:
            return {"format": "csv"}
        own = asdict(options)
        del own["questions"], own["labels"]  # the folder does not say which of its texts to read
        return {**BUILT_IN.get(name, {}), "format": "shapes", **own}
    if name in BUILT_IN:
        return BUILT_IN[name]
    there = sorted(path.name for path in folder.parent.glob("[!.]*/"))
    known = registry.nearest(name, sorted({*data.datasets, *there, *BUILT_IN}))
    raise UserError(
        f"no dataset is called {name!r}; {known} (folders in {folder.parent}: "
        f"{', '.join(there) or 'none'}; data.datasets: {', '.join(data.datasets) or 'none'}; "
        f"built in: {', '.join(BUILT_IN)})",
        key=key,
    )


def _validated(
    form: type[schema.Section], options: dict[str, Any], data_path: Path, name: str
) -> tuple[schema.Section, RowOptions]:
    """A format's own options, with ``root`` made relative to ``data_path``, and every dataset's."""
    general = _general(form.model_fields)
    rows = {option: options[option] for option in general & set(options)}
    own = {option: options[option] for option in set(options) - general - {"format"}}
    if "root" in form.model_fields:
        own["root"] = data_path / str(own.get("root", name))
    for option in sorted(set(own) - set(form.model_fields)):
        hint = registry.nearest(option, sorted({*form.model_fields, *general}))
        raise UserError(
            f"dataset {name!r}: format {options['format']} has no {option!r}; {hint}",
            key=f"data.datasets.{name}.{option}",
        )
    return _section(form, own, name), _section(RowOptions, rows, name)


def _section(form: type[Form], values: dict[str, Any], name: str) -> Form:
    found, wrong = validate(form, values)
    if found is None:
        path, message = next(iter(wrong.items()))
        option = ".".join(path)
        key = f"data.datasets.{name}.{option}"
        raise UserError(f"dataset {name!r}: {option}: {message}", key=key)
    return found
