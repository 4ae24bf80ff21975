"""The built-in dataset: drawn into the CSV folder form at first use, then read like any other.

With ``texts: questions`` a row is a question about an image, with ``texts: conversations`` all
questions about it; the folder then also holds them as VQA v2 has its files. With ``texts: matches``
it is the question whether a caption is true of an image; half of them have one word changed. With
``texts: labels`` it is an image and the names of what it shows.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from engine import registry
from engine.data.cache import build_cached
from engine.data.tables.paths import FolderOptions
from engine.errors import UserError
from engine.tools.shapes import folder as drawn
from engine.tools.shapes.scenes import content_scores
from engine.types import Source


class Config(FolderOptions):
    """Options of ``format: shapes``: the images are a pure function of all but ``root``."""

    style: Literal["flat", "sketch"] = "flat"
    seed: Annotated[int, Field(ge=0)] = 0
    num_train: Annotated[int, Field(ge=1, le=60_000)] = 6000  # there are about 79,000 scenes
    num_valid: Annotated[int, Field(ge=1, le=3_600)] = 600  # four each of about 1,000 families
    image_size: Annotated[int, Field(ge=16, le=512)] = 64  # pixels
    texts: Literal["captions", "questions", "conversations", "matches", "labels"] = "captions"


def build(config: Config, *, name: str, split: str, cache_dir: Path) -> Source:
    """One split, drawn first where ``root`` is missing: by one process, while others wait.

    Raises UserError where ``root`` holds something else than these options draw.
    """
    own = config.model_dump(exclude={"root", "texts"})
    options = drawn.Options(
        **own,
        questions=config.texts in ("questions", "conversations", "matches"),
        labels=config.texts == "labels",
    )
    try:
        build_cached(config.root, lambda temporary: _draw(temporary, options))
    except OSError as error:
        raise UserError(f"cannot draw dataset {name!r} into {config.root}: {error}") from error
    _check(config.root, name, options)
    form, files = _READ_AS[config.texts]
    chosen = {f"{part}_anno": files.format(part) for part in ("train", "valid")}
    # The drawn folder is read through the registry: formats do not import one another.
    module = registry.find("data/formats", form)
    read = module.Config(root=config.root, **chosen)
    source: Source = module.build(read, name=name, split=split, cache_dir=cache_dir)
    source.content_scores = content_scores
    return source


_READ_AS = {  # a format, and its annotation files
    "captions": ("csv", "{}_anno.csv"),
    "questions": ("csv", "{}_questions.csv"),
    "conversations": ("llava", "{}_conversations.json"),
    "matches": ("csv", "{}_matches.csv"),
    "labels": ("csv", "{}_labels.csv"),
}


def _draw(folder: Path, options: drawn.Options) -> None:
    folder.mkdir()
    drawn.write(folder, options)


def _check(folder: Path, name: str, options: drawn.Options) -> None:
    found = drawn.read_options(folder)
    if found is None:
        raise UserError(
            f"{folder} was not drawn by the engine; give the dataset another name or root, "
            f"or read it with format: csv",
            key=f"data.datasets.{name}.format",
        )
    wanted, old = asdict(options), asdict(found)
    for more in ("questions", "labels"):  # captions are there in either case
        old[more] &= wanted[more]
    if differing := [option for option in wanted if wanted[option] != old[option]]:
        old_options = ", ".join(f"{o}={old[o]} (wanted: {wanted[o]})" for o in differing)
        raise UserError(
            f"{folder} was drawn with {old_options}; remove the folder or name another root",
            key=f"data.datasets.{name}."
            + ("texts" if differing[0] in ("questions", "labels") else differing[0]),
        )
