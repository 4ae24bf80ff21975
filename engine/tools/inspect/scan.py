"""One pass over all datasets in several processes: each sample read as a run reads it, and counted.

What the processes find is put together in the order of the datasets.
"""

import io
import json
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Self

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

_THUMBNAIL = 224  # pixels of the longer side
_HASHED_AT = (128, 128)  # a JPEG is decoded at a smaller scale that is still at least this
_NUM_TEXTS = 8  # rows of an image that are shown
_LYING = (5, 6, 7, 8)  # EXIF 2.32, section 4.6.4: rows are the picture's columns
_ORIENTATION = 0x0112

_CHUNK = 64  # images that a process reads at once
_NUM_NAMED = 5  # bad samples of each cause
# What is kept of an image for the search of copies: its part, its place there, its signature.
_PICTURE = np.dtype(
    [("part", "i4"), ("place", "i8"), ("hash", "u8"), ("tiny", "u1", TINY * TINY * 3)]
)

Copy = tuple[int, str]  # of an image that occurs more than once: its part, its name


@dataclass
class Counts:
    """What was found; those of chunks are added up. Each Counter maps a value to its number."""

    examples: list[tuple[bytes, list[Row]]] = field(default_factory=list)  # JPEG, rows that show it
    rows: int = 0
    images: int = 0  # that could be decoded
    copies: int = 0  # images that are copies of an earlier one of the part
    text_alone: int = 0  # rows
    bytes: int = 0
    kinds: Counter[str] = field(default_factory=Counter)  # jpg, png, …
    widths: Counter[int] = field(default_factory=Counter)
    heights: Counter[int] = field(default_factory=Counter)
    tokens: Counter[int] = field(default_factory=Counter)  # of a caption
    words: Counter[int] = field(default_factory=Counter)
    captions: Counter[int] = field(default_factory=Counter)  # of an image
    turns: Counter[int] = field(default_factory=Counter)  # of a conversation
    turn_tokens: Counter[int] = field(default_factory=Counter)
    answers: Counter[int] = field(default_factory=Counter)  # of a question
    labels: Counter[str] = field(default_factory=Counter)
    causes: Counter[str] = field(default_factory=Counter)  # of bad samples

    def __iadd__(self, other: Self) -> Self:
        for each in fields(self):
            setattr(self, each.name, getattr(self, each.name) + getattr(other, each.name))
        return self


@dataclass
class Part:
    """A split of a dataset to inspect, and what was found in it."""

    source: Source
    groups: Groups  # the rows of each image
    images: np.ndarray  # int64: which of the images are read
    shown: frozenset[int]  # which of them are for the contact sheet
    counts: Counts = field(default_factory=Counts)
    bad_names: dict[str, list[str]] = field(default_factory=dict)  # the first of each cause

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
class Findings:
    """Everything that is reported."""

    parts: list[Part]
    max_tokens: int
    copies: list[list[Copy]] = field(default_factory=list)

    @property
    def titles(self) -> list[str]:
        return [part.title for part in self.parts]

    def copies_in(self, num_splits: int) -> list[list[Copy]]:
        """Copies that are all of one split (1), or of which each split has some (2)."""
        splits = [part.source.split for part in self.parts]
        return [g for g in self.copies if len({splits[part] for part, _ in g}) == num_splits]


def scan(work: Work, max_tokens: int, num_jobs: int, console: Console, output: Path) -> Findings:
    """Read all parts; writes ``bad_samples.jsonl`` and ``copies.jsonl`` into ``output``.

    Memory is bounded: what is kept of each image for the search of copies is on disk.
    """
    findings = Findings(work.parts, max_tokens)
    items = [
        (number, first, min(first + _CHUNK, len(part.images)))
        for number, part in enumerate(work.parts)
        for first in range(0, len(part.images), _CHUNK)
    ]
    total, end = sum(len(part.images) for part in work.parts), 0
    with (
        tempfile.TemporaryDirectory(prefix=".making-", dir=output) as scratch,
        (output / "bad_samples.jsonl").open("w", encoding="utf8", errors="replace") as bad_file,
        jobs.progress_bar("inspecting", total, console) as tick,
    ):
        pictures = np.memmap(Path(scratch, "pictures"), _PICTURE, "w+", shape=max(total, 1))
        chunks = jobs.each(read_chunk, work, items, num_jobs, tick)
        for (number, *_), (counts, found, bad) in zip(items, chunks, strict=True):
            part = work.parts[number]
            part.counts += counts
            pictures[end : end + len(found)] = found
            end += len(found)
            for record in bad:
                named = part.bad_names.setdefault(record.cause, [])
                named += [record.key][: _NUM_NAMED - len(named)]
                bad_file.write(json.dumps(record.to_json(), ensure_ascii=False) + "\n")
        _name_copies(findings, pictures[:end])
    with (output / "copies.jsonl").open("w", encoding="utf8", errors="replace") as file:
        for group in findings.copies:  # a line a group: ``[[dataset and split, name], …]``
            line = [[findings.titles[part], key] for part, key in group]
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    return findings


def _name_copies(findings: Findings, pictures: np.ndarray) -> None:
    for group in find_copies(np.ascontiguousarray(pictures["hash"]), pictures["tiny"]):
        places = [pictures[place][["part", "place"]].item() for place in group]
        findings.copies.append(
            [(number, _key(findings.parts[number], place)) for number, place in places]
        )
        for number, times in Counter(number for number, _ in places).items():
            findings.parts[number].counts.copies += times - 1


def _key(part: Part, place: int) -> str:
    image = int(part.images[place])
    for row in part.groups[image].tolist():
        with suppress(BadSample):
            return part.source[row].key
    return f"image {image + 1}"


def read_chunk(
    work: Work, item: tuple[int, int, int], tick: jobs.Tick
) -> tuple[Counts, np.ndarray, list[BadRecord]]:
    """What is found in the images ``first`` … ``end - 1`` of a part."""
    number, first, end = item
    part, counts, bad = work.parts[number], Counts(), list[BadRecord]()
    found = []
    for place in range(first, end):
        image = int(part.images[place])
        picture, rows = _read_image(work, part, image, counts, bad)
        if picture is not None:
            found.append((number, place, *signature(picture)))
            if image in part.shown:
                counts.examples.append((_thumbnail(picture), rows[:_NUM_TEXTS]))
        tick(1)
    return counts, np.array(found, _PICTURE), bad


def _read_image(
    work: Work, part: Part, image: int, counts: Counts, bad: list[BadRecord]
) -> tuple[Image.Image | None, list[Row]]:
    """The picture of an image and the rows that show it; None where it cannot be used."""
    picture, shown, rows, usable = None, None, list[Row](), 0
    for number in part.groups[image].tolist():
        counts.rows += 1
        key = f"row {number + 1}"
        try:
            row = part.source[number]
            key = row.key
            if len(row.caption) > work.max_chars:
                raise BadSample("caption too long", f"{len(row.caption)} characters")
            if not row.images:
                if not row.turns:
                    raise BadSample("no image", "text alone")
                counts.text_alone += 1
            elif picture is None or row.images[0] != shown:
                picture, rows = _picture(work, row.images[0], counts), []
                shown = row.images[0]
        except BadSample as why:
            counts.causes[why.cause] += 1
            bad.append(BadRecord(None, part.title, number, key, why.cause, why.detail))
            continue
        usable += 1
        _count_texts(work, row, counts)
        if row.images:
            rows.append(row)
    if usable:
        counts.captions[usable] += 1
    return picture, rows


def _picture(work: Work, image: EncodedImage, counts: Counts) -> Image.Image:
    """The decoded image, counted; raises BadSample as a run would find it bad."""
    data = read_bytes(image)
    picture = decode(data, max_pixels=work.max_pixels, target=_HASHED_AT)
    with suppress(BadSample):
        counts.kinds[ending_of(data)] += 1
    counts.images += 1
    counts.bytes += len(data)
    width, height = _size(data) or picture.size
    counts.widths[width] += 1
    counts.heights[height] += 1
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


def _thumbnail(picture: Image.Image) -> bytes:
    small = picture.convert("RGB")
    small.thumbnail((_THUMBNAIL, _THUMBNAIL))
    out = io.BytesIO()
    small.save(out, "JPEG", quality=80)
    return out.getvalue()
