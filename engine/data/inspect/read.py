"""The samples of a dataset, a chunk at a time: each read as a run reads it, and counted."""

from __future__ import annotations

import io
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from engine.data.bad_samples import BadRecord
from engine.data.decode import decode
from engine.data.image_files import ending_of, read_bytes
from engine.data.inspect.image_hash import TINY, signature
from engine.data.views.groups import Groups
from engine.tools.jobs import Tick
from engine.types import BadSample, Record, Source

THUMBNAIL = 224  # pixels of the longer side
_HASHED_AT = (128, 128)  # a JPEG is decoded at a smaller scale that is still at least this
_NUM_TEXTS = 8  # rows of an image that are shown
_LYING = (5, 6, 7, 8)  # EXIF 2.32, section 4.6.4: rows are the picture's columns
_ORIENTATION = 0x0112


@dataclass(frozen=True)
class Part:
    """A split of a dataset as it is inspected: ``groups`` are the rows of each image."""

    source: Source
    groups: Groups
    images: np.ndarray  # int64: which of the images are read
    shown: frozenset[int]  # which of them are for the contact sheet

    @property
    def title(self) -> str:
        return f"{self.source.name} {self.source.split}"


@dataclass(frozen=True)
class Work:
    """What each process is sent once."""

    parts: list[Part]
    tokenizer: dict[str, Any]  # TextTokenizer.state()
    max_pixels: int
    max_chars: int  # of a caption

    @cached_property
    def tokens(self) -> Any:
        """A function of a text: how many tokens it is, special ones included."""
        from engine.data.text.tokenizer import TextTokenizer

        tokenizer = TextTokenizer.from_state(self.tokenizer)
        return lambda text: len(tokenizer.tokenizer.encode(tokenizer.clean(text)).ids)

    def __getstate__(self) -> dict[str, Any]:
        return {
            name: getattr(self, name) for name in ("parts", "tokenizer", "max_pixels", "max_chars")
        }


@dataclass
class Example:
    """An image of the contact sheet, with all that its rows say."""

    image: int
    key: str
    jpeg: bytes
    records: list[Record]


@dataclass
class Counts:
    """What was found; chunks are added up. Each Counter is value: how often."""

    rows: int = 0
    images: int = 0  # that could be decoded
    text_alone: int = 0  # rows
    bytes: int = 0
    kinds: Counter[str] = field(default_factory=Counter)  # jpg, png, …
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)  # width, height
    tokens: Counter[int] = field(default_factory=Counter)  # of a caption
    words: Counter[int] = field(default_factory=Counter)
    captions: Counter[int] = field(default_factory=Counter)  # of an image
    turns: Counter[int] = field(default_factory=Counter)  # of a conversation
    turn_tokens: Counter[int] = field(default_factory=Counter)
    answers: Counter[int] = field(default_factory=Counter)  # of a question
    labels: Counter[str] = field(default_factory=Counter)
    causes: Counter[str] = field(default_factory=Counter)  # of bad samples

    def add(self, other: Counts) -> None:
        """Take in another chunk's."""
        for name in self.__dataclass_fields__:
            setattr(self, name, getattr(self, name) + getattr(other, name))


@dataclass
class Chunk:
    """The images ``[first, first + len)`` of a part's ``images``, as one process found them."""

    part: int
    first: int
    counts: Counts
    places: np.ndarray  # int64: which of them have a signature
    hashes: np.ndarray  # uint64
    tinies: np.ndarray  # uint8 [images, TINY · TINY · 3]
    examples: list[Example]
    bad: list[BadRecord]


def read_chunk(work: Work, item: tuple[int, int, int], tick: Tick) -> Chunk:
    """Read the images ``first`` … ``end - 1`` of a part."""
    number, first, end = item
    part, counts = work.parts[number], Counts()
    found: list[tuple[int, int, np.ndarray]] = []
    examples: list[Example] = []
    bad: list[BadRecord] = []
    for place in range(first, end):
        image = int(part.images[place])
        seen = _read_image(work, part, image, counts, bad)
        if seen is not None:
            hashed, tiny = signature(seen.picture)
            found.append((place, hashed, tiny))
        if seen is not None and image in part.shown:
            records = seen.records[:_NUM_TEXTS]
            examples.append(Example(image, records[0].key, thumbnail(seen.picture), records))
        tick(1)
    places, hashes, tinies = zip(*found, strict=True) if found else ((), (), ())
    return Chunk(
        number,
        first,
        counts,
        np.array(places, np.int64),
        np.array(hashes, np.uint64),
        np.array(tinies, np.uint8).reshape(-1, TINY * TINY * 3),
        examples,
        bad,
    )


@dataclass
class _Seen:
    picture: Image.Image
    records: list[Record]


def _read_image(
    work: Work, part: Part, image: int, counts: Counts, bad: list[BadRecord]
) -> _Seen | None:
    """The picture that an image's rows show and those rows; None where it cannot be used."""
    seen: _Seen | None = None
    shown: Path | bytes | None = None
    usable = 0
    for row in part.groups[image].tolist():
        counts.rows += 1
        key = f"row {row + 1}"
        try:
            record = part.source[row]
            key = record.key
            if len(record.caption) > work.max_chars:
                raise BadSample("caption too long", f"{len(record.caption)} characters")
            if record.image is None:
                if not record.turns:
                    raise BadSample("no image", "text alone")
                counts.text_alone += 1
            elif seen is None or record.image != shown:
                seen, shown = _Seen(_picture(work, record.image, counts), []), record.image
        except BadSample as why:
            counts.causes[why.cause] += 1
            bad.append(BadRecord(None, part.title, row, key, why.cause, why.detail))
            continue
        usable += 1
        _count_texts(work, record, counts)
        if seen is not None and record.image is not None:
            seen.records.append(record)
    if usable:
        counts.captions[usable] += 1
    return seen


def _picture(work: Work, image: Path | bytes, counts: Counts) -> Image.Image:
    """The decoded image, counted; raises BadSample as a run would find it bad."""
    data = read_bytes(image)
    picture = decode(data, max_pixels=work.max_pixels, target=_HASHED_AT)
    with suppress(BadSample):
        counts.kinds[ending_of(data)] += 1
    counts.images += 1
    counts.bytes += len(data)
    counts.sizes[_size(data) or picture.size] += 1
    return picture


def _size(data: bytes) -> tuple[int, int] | None:
    """Width and height of an upright image that could be decoded, at its full scale."""
    with suppress(Exception), Image.open(io.BytesIO(data)) as opened:
        width, height = opened.size
        lying = opened.getexif().get(_ORIENTATION) in _LYING
        return (height, width) if lying else (width, height)
    return None


def _count_texts(work: Work, record: Record, counts: Counts) -> None:
    counts.tokens[work.tokens(record.caption)] += 1
    counts.words[len(record.caption.split())] += 1
    if record.turns:
        counts.turns[len(record.turns)] += 1
        counts.turn_tokens[sum(work.tokens(text) for _, text in record.turns)] += 1
    if record.answers:
        counts.answers[len(record.answers)] += 1
    counts.labels.update(record.labels)


def thumbnail(picture: Image.Image) -> bytes:
    """A small JPEG."""
    small = picture.convert("RGB")
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    out = io.BytesIO()
    small.save(out, "JPEG", quality=80)
    return out.getvalue()
