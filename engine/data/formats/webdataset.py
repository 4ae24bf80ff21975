"""Tar shards of images with texts, as webdataset and img2dataset write them.

    <root>/train/00000.tar … 00012.tar     members 000000017.jpg, 000000017.txt, 000000017.json
    <root>/valid/…

Shards on this machine's disks are indexed once and then read by row; remote and piped ones are
streamed. engine/data/tar/texts.py says what of a JSON is read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, PositiveInt

from engine.data.stream.open import check_urls
from engine.data.stream.source import Stream, copy_shards
from engine.data.tables.paths import FolderOptions, SplitFolder
from engine.data.tar.shards import open_shards
from engine.data.tar.texts import TextForm
from engine.data.tar.urls import expand, is_remote
from engine.errors import UserError
from engine.types import Source

Shards = str | list[str]


class Config(FolderOptions):
    """Options of ``format: webdataset``; local shards are relative to ``root``.

    Shards are named by braces, ``*`` and ``::``: ``train/{00000..00012}.tar``, ``*.tar``,
    ``a.tar::b.tar``, ``https://host/{000..099}.tar``.
    """

    train: Shards | None = None  # default: train/*.tar if there are any, else *.tar
    valid: Shards | None = None  # default: valid/*.tar
    text: Annotated[str, Field(pattern=r"^\w+$")] = "txt"  # ending of the members with captions
    caption: str | None = None  # a field of the JSON to take captions from instead
    stream: bool = False  # train from front to end through local shards too
    allow_pipe: bool = False  # let shards named pipe:COMMAND run their commands
    window: PositiveInt = 1000  # samples within which a reader of streamed shards shuffles
    length: PositiveInt | None = None  # training samples; default: counted once


def build(config: Config, *, name: str, split: str, cache_dir: Path) -> Source | Stream:
    """Open one split. Raises UserError for shards that are missing, and where none is usable."""
    at = f"data.datasets.{name}"
    patterns, key = config.train if split == "train" else config.valid, f"{at}.{split}"
    if patterns is None:
        root, key = SplitFolder(config, name, split).root, at
        # As the packer writes them; as img2dataset writes them, without a split.
        flat = split == "train" and not next((root / split).glob("*.tar"), None)
        patterns = "*.tar" if flat else f"{split}/*.tar"
    urls = expand(patterns, config.root, key=key)
    form = TextForm(config.text, config.caption)
    if config.stream or any(map(is_remote, urls)):
        check_urls(urls, allow_pipe=config.allow_pipe, key=key)
        if split == "train":
            return Stream(name, urls, form, config.window, cache_dir, config.length)
        urls = copy_shards(urls, name=name, cache_dir=cache_dir)
    source = open_shards(
        urls, name=name, split=split, root=config.root, cache_dir=cache_dir, form=form, key=key
    )
    if split == "train" and config.length not in (None, len(source)):
        raise UserError(
            f"dataset {name!r} has {len(source)} training rows, but its length is given as "
            f"{config.length}; correct it or leave it out",
            key=f"{at}.length",
        )
    return source
