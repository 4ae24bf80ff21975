"""A table of annotations as one split of a dataset."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import repeat
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from engine.data.tables import lengths
from engine.data.tables.fields import most_common
from engine.data.tables.image_root import ImageRoot
from engine.data.tables.table import Table
from engine.types import BadSample, Row, Source, Turn


class ImageStore(Protocol):
    """Image bytes that lie in annotation files."""

    def read(self, file: int, offset: int, extent: int, count: int) -> tuple[bytes, ...]:
        """The first ``count`` images at a row's place; raises BadSample where there are fewer."""
        ...


class AnnotationSource(Source):
    """Rows of a table as one split of a dataset.

    ``images`` is the folder of images that rows name, ``store`` reads those that lie in files of
    many. A row that names neither has image None.
    """

    def __init__(
        self,
        name: str,
        split: str,
        table: Table,
        images: ImageRoot | None = None,
        store: ImageStore | None = None,
    ) -> None:
        self.name = name
        self.split = split
        self.table = table
        self.images = images
        self.store = store

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> Row:
        """The row at ``index``; BadSample where it cannot be used, or its image lies elsewhere."""
        row = self.table.row(index)
        number = f"row {index + 1}"
        if row.get("fault"):
            cause, _, detail = row["fault"].partition(": ")
            raise BadSample(cause, detail)
        if row["caption"] is None:
            raise BadSample("not text", f"{number} is not UTF-8")
        if not row["caption"].strip():
            raise BadSample("no answer" if row.get("turns") else "no caption", number)
        given = tuple(answer for answer in row.get("answers") or () if answer)
        images = self._images(row, number)
        return Row(
            row["image"] or number,
            images,
            row["caption"],
            row["image_id"],
            row["caption_id"],
            row.get("label"),
            _turns(row, given),
            given,
            tuple(label for label in row.get("labels") or () if label),
            row.get("question_type") or "",
            row.get("answer_type") or "",
        )

    def _images(self, row: dict[str, Any], number: str) -> tuple[Path | bytes, ...]:
        if row.get("file") is not None and self.store is not None:
            count = row.get("num_images") or 1
            return self.store.read(row["file"], row["offset"], row["extent"], count)
        names = () if row["image"] is None else (row["image"], *(row.get("more_images") or ()))
        for name in names:
            if not name:
                raise BadSample("missing", f"{number} names no image")
            if self.images is None:
                raise BadSample("missing", f"{number} names {name!r}; there is no image folder")
        return tuple(self.images.path(name) for name in names) if self.images else ()

    def column(self, name: str) -> np.ndarray:
        """int64 codes of ``image_id`` or ``caption_id``, equal where the ids are, or one of
        engine/data/tables/lengths.py; memory-mapped."""
        made = lengths.COLUMNS.get(name)
        return self.table.codes(name) if made is None else made(self.table)

    @property
    def has_conversations(self) -> bool:
        """Whether any row has turns of its own."""
        return "turns" in self.table.column_names and self.table.has_values("turns")

    def conversations(self) -> Iterator[tuple[Turn, ...]]:
        """The turns of all rows in order, none of those that are no conversation."""
        if "turns" not in self.table.column_names:
            return repeat((), len(self))
        return (_spoken(turns) for turns in self.table.values("turns"))

    def captions(self) -> Iterator[str]:
        """All captions in order, without their images; empty where a row has none."""
        return (caption or "" for caption in self.table.values("caption"))


def _spoken(turns: list[dict[str, str]] | None) -> tuple[Turn, ...]:
    return tuple((turn["role"], turn["text"]) for turn in turns or ())


def _turns(row: dict[str, Any], given: tuple[str, ...]) -> tuple[Turn, ...]:
    if row.get("turns"):
        return _spoken(row["turns"])
    if not row.get("question"):
        return ()
    asked = ("human", row["question"])
    return (asked, ("gpt", most_common(given))) if given else (asked,)
