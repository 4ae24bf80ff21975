"""One pass over all datasets in several processes: each sample read as a run reads it, and counted.

What the processes find is put together in the order of the datasets.
"""

from __future__ import annotations

import io
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console

from engine.data.bad_samples import BadRecord
from engine.data.decode import decode
from engine.data.groups import Groups
from engine.data.image_files import ending_of, read_bytes
from engine.tools import jobs
from engine.tools.inspect.copies import TINY, find_copies, signature
from engine.types import BadSample, EncodedImage, Row, Source

COPIES_FILE, BAD_FILE = "copies.jsonl", "bad_samples.jsonl"
THUMBNAIL = 224  # pixels of the longer side
_HASHED_AT = (128, 128)  # a JPEG is decoded at a smaller scale that is still at least this
_NUM_TEXTS = 8  # rows of an image that are shown
_LYING = (5, 6, 7, 8)  # EXIF 2.32, section 4.6.4: rows are the picture's columns
_ORIENTATION = 0x0112

_CHUNK = 64  # images that a process reads at once
_NUM_NAMED = 5  # bad samples of each cause
_TINY_BYTES = TINY * TINY * 3

Item = tuple[int, int, int]  # a part and the bounds of a chunk of its images


@dataclass(frozen=True)
class Part:
    """A split of a dataset to inspect: ``groups`` are the rows of each image."""

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
    def tokens(self) -> Callable[[str], int]:
        """A function of a text: how many tokens it is, special ones included."""
        from engine.data.text.tokenizer import TextTokenizer, clean

        tokenizer = TextTokenizer.from_state(self.tokenizer)
        return lambda text: len(tokenizer.tokenizer.encode(clean(text)).ids)


@dataclass
class Example:
    """An image of the contact sheet, with the rows that show it."""

    image: int
    key: str
    jpeg: bytes
    records: list[Row]


@dataclass
class Counts:
    """What was found; those of chunks are added up. Each Counter maps a value to its number."""

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


@dataclass
class Copy:
    """An image that occurs more than once: its part, its number there, its name."""

    part: int
    image: int
    key: str


@dataclass
class Findings:
    """Everything that is reported; ``counts`` and ``examples`` are in the order of ``parts``."""

    parts: list[Part]
    max_tokens: int
    counts: list[Counts]
    examples: list[list[Example]]
    copies: list[list[Copy]] = field(default_factory=list)
    bad_names: dict[tuple[int, str], list[str]] = field(default_factory=dict)  # the first of each

    @property
    def titles(self) -> list[str]:
        return [part.title for part in self.parts]

    @property
    def leaks(self) -> list[list[Copy]]:
        """Copies of which some are in a train and some in a valid split."""
        return [group for group in self.copies if self._num_splits(group) > 1]

    @property
    def repeated(self) -> list[list[Copy]]:
        """Copies that are all in train splits, or all in valid ones."""
        return [group for group in self.copies if self._num_splits(group) == 1]

    def _num_splits(self, group: list[Copy]) -> int:
        return len({self.parts[copy.part].source.split for copy in group})


def scan(work: Work, max_tokens: int, num_jobs: int, console: Console, output: Path) -> Findings:
    """Read all parts; writes ``bad_samples.jsonl`` and ``copies.jsonl`` into ``output``.

    Memory is bounded: what is kept of each image for the search of copies is on disk.
    """
    findings = Findings(
        work.parts, max_tokens, [Counts() for _ in work.parts], [[] for _ in work.parts]
    )
    items: list[Item] = [
        (number, first, min(first + _CHUNK, len(part.images)))
        for number, part in enumerate(work.parts)
        for first in range(0, len(part.images), _CHUNK)
    ]
    total = sum(len(part.images) for part in work.parts)
    with (
        tempfile.TemporaryDirectory(prefix=".making-", dir=output) as scratch,
        (output / BAD_FILE).open("w", encoding="utf8", errors="replace") as bad_file,
        jobs.progress_bar("inspecting", total, console) as tick,
    ):
        signatures = _Signatures(Path(scratch), total)
        for chunk in _in_order(work, items, num_jobs, tick):
            findings.counts[chunk.part].add(chunk.counts)
            findings.examples[chunk.part] += chunk.examples
            signatures.add(chunk)
            for bad in chunk.bad:
                _name(findings, chunk.part, bad)
                bad_file.write(json.dumps(bad.to_json(), ensure_ascii=False) + "\n")
        findings.copies = signatures.copies(work.parts)
    _write_copies(output / COPIES_FILE, findings)
    return findings


def _in_order(work: Work, items: Sequence[Item], num_jobs: int, tick: jobs.Tick) -> Iterator[Chunk]:
    """The chunks as ``items`` has them, each held back until those before it are there."""
    waiting: dict[tuple[int, int], Chunk] = {}
    following = iter(items)
    wanted = next(following, None)
    for chunk in jobs.each(read_chunk, work, items, jobs=num_jobs, tick=tick):
        waiting[chunk.part, chunk.first] = chunk
        while wanted is not None and wanted[:2] in waiting:
            yield waiting.pop(wanted[:2])
            wanted = next(following, None)


def _name(findings: Findings, part: int, bad: BadRecord) -> None:
    named = findings.bad_names.setdefault((part, bad.cause), [])
    if len(named) < _NUM_NAMED:
        named.append(bad.key)


class _Signatures:
    """Hash and tiny picture of every image, in files that are mapped into memory."""

    def __init__(self, folder: Path, total: int) -> None:
        shape = max(total, 1)
        self._hashes = np.memmap(folder / "hashes", np.uint64, "w+", shape=shape)
        self._tinies = np.memmap(folder / "tinies", np.uint8, "w+", shape=(shape, _TINY_BYTES))
        self._images = np.memmap(folder / "images", np.int64, "w+", shape=(shape, 2))
        self._number = 0

    def add(self, chunk: Chunk) -> None:
        first, end = self._number, self._number + len(chunk.hashes)
        self._hashes[first:end], self._tinies[first:end] = chunk.hashes, chunk.tinies
        self._images[first:end, 0], self._images[first:end, 1] = chunk.part, chunk.places
        self._number = end

    def copies(self, parts: Sequence[Part]) -> list[list[Copy]]:
        """Groups of images that are copies of one another, named."""
        found = find_copies(self._hashes[: self._number], self._tinies[: self._number])
        return [[_copy(parts, *self._images[place].tolist()) for place in group] for group in found]


def _copy(parts: Sequence[Part], number: int, place: int) -> Copy:
    part = parts[number]
    image = int(part.images[place])
    for row in part.groups[image].tolist():
        try:
            return Copy(number, image, part.source[row].key)
        except BadSample:
            continue
    return Copy(number, image, f"image {image + 1}")


def _write_copies(path: Path, findings: Findings) -> None:
    """A line a group: ``[[dataset and split, name], …]``."""
    with path.open("w", encoding="utf8", errors="replace") as file:
        for group in findings.copies:
            named = [[findings.titles[copy.part], copy.key] for copy in group]
            file.write(json.dumps(named, ensure_ascii=False) + "\n")


def read_chunk(work: Work, item: Item, tick: jobs.Tick) -> Chunk:
    """Read the images ``first`` … ``end - 1`` of a part."""
    number, first, end = item
    part, counts = work.parts[number], Counts()
    found: list[tuple[int, int, np.ndarray]] = []
    examples: list[Example] = []
    bad: list[BadRecord] = []
    for place in range(first, end):
        image = int(part.images[place])
        picture, records = _read_image(work, part, image, counts, bad)
        if picture is not None:
            found.append((place, *signature(picture)))
            if image in part.shown:
                records = records[:_NUM_TEXTS]
                examples.append(Example(image, records[0].key, thumbnail(picture), records))
        tick(1)
    places, hashes, tinies = zip(*found, strict=True) if found else ((), (), ())
    return Chunk(
        number,
        first,
        counts,
        np.array(places, np.int64),
        np.array(hashes, np.uint64),
        np.array(tinies, np.uint8).reshape(-1, _TINY_BYTES),
        examples,
        bad,
    )


def _read_image(
    work: Work, part: Part, image: int, counts: Counts, bad: list[BadRecord]
) -> tuple[Image.Image | None, list[Row]]:
    """The picture of an image and the rows that show it; None where it cannot be used."""
    picture, shown, records, usable = None, None, list[Row](), 0
    for row in part.groups[image].tolist():
        counts.rows += 1
        key = f"row {row + 1}"
        try:
            record = part.source[row]
            key = record.key
            if len(record.caption) > work.max_chars:
                raise BadSample("caption too long", f"{len(record.caption)} characters")
            if not record.images:
                if not record.turns:
                    raise BadSample("no image", "text alone")
                counts.text_alone += 1
            elif picture is None or record.images[0] != shown:
                picture, records = _picture(work, record.images[0], counts), []
                shown = record.images[0]
        except BadSample as why:
            counts.causes[why.cause] += 1
            bad.append(BadRecord(None, part.title, row, key, why.cause, why.detail))
            continue
        usable += 1
        _count_texts(work, record, counts)
        if record.images:
            records.append(record)
    if usable:
        counts.captions[usable] += 1
    return picture, records


def _picture(work: Work, image: EncodedImage, counts: Counts) -> Image.Image:
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


def _count_texts(work: Work, record: Row, counts: Counts) -> None:
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
