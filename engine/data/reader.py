"""One row of a dataset → a decoded, transformed sample, or the reason why not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from engine.config.schema import Data
from engine.data.bad_samples import BadRecord
from engine.data.decode import decode_by, read_file
from engine.data.permutation import hash64
from engine.data.transforms.pipeline import Pipeline
from engine.data.views.rows import Draw, origin
from engine.types import BadSample, Record, Sample, Source


@dataclass(frozen=True, slots=True)
class Limits:
    """What a sample may be at most; ``text_alone``: whether one without an image is of use.

    ``usable`` raises BadSample for a record whose text the task cannot learn from.
    """

    max_pixels: int = 178_956_970  # Pillow's bound for a decompression bomb
    max_caption_chars: int = 100_000
    text_alone: bool = False
    usable: Callable[[Record], None] | None = None

    def check(self, record: Record) -> None:
        """Raises BadSample."""
        if record.image is None and not self.text_alone:
            raise BadSample("no image")
        longest = max([len(record.caption), *(len(text) for _, text in record.turns)])
        if longest > self.max_caption_chars:
            raise BadSample(
                "caption too long",
                f"{longest} characters, data.max_caption_chars {self.max_caption_chars}",
            )
        if self.usable is not None:
            self.usable(record)


def limits_of(data: Data, task: Any) -> Limits:
    """What training on ``data`` asks of a sample; a task may have a ``usable``."""
    usable = getattr(task, "usable", None)
    return Limits(data.max_image_pixels, data.max_caption_chars, usable=usable)


Transform = Callable[..., Tensor]  # a Pipeline, or of a PIL image alone


class Fetched(NamedTuple):
    """A row whose image is still encoded."""

    step: int
    source: str
    number: int  # of the row in that source, where ``dataset`` and ``row`` name it in a view
    dataset: int
    row: int
    seed: int
    record: Record
    data: bytes | None


class Reader:
    """Rows → samples; the randomness of each depends on (seed, epoch, dataset, row) alone.

    Without a seed a sample carries none, and random transforms repeat from epoch to epoch.
    """

    def __init__(
        self,
        sources: Sequence[Source] | Mapping[int, Source],
        transform: Transform,
        seed: int | None,
        limits: Limits,
    ) -> None:
        self.sources, self.transform = sources, transform
        self.seed, self.limits = seed, limits
        # A pipeline knows how images are to be decoded for it; another callable gets Pillow's.
        known = transform if isinstance(transform, Pipeline) else None
        self.target = known.decode_size if known else None
        self.decoder = known.decoder if known else "pillow"
        self.size = known.size if known else None  # (height, width) of all images, where known

    def read(
        self, step: int, epoch: int, dataset: int, row: int, out: Tensor | None = None
    ) -> Sample | BadRecord:
        """The sample at a row, its image written to ``out`` where that is given and ``size`` known.

        Reseeds torch's global CPU generator, which the caller restores.
        """
        return self.decode(self.fetch(step, epoch, dataset, row), out)

    def fetch(self, step: int, epoch: int, dataset: int, row: int) -> Fetched | BadRecord:
        """The first half of ``read``, up to the image's bytes."""
        seed = hash64(self.seed or 0, epoch, dataset, row) >> 1  # 63 bits: any generator takes it
        draw = None if self.seed is None else Draw(self.seed, epoch)
        # Of a view, where the row lies in the dataset itself: what a message has to name.
        source, number = origin(self.sources[dataset], row, draw)
        key = f"row {number}"
        try:
            record = source[number]
            key = record.key
            self.limits.check(record)
            image = record.image
            data = read_file(image) if isinstance(image, Path) else image
        except BadSample as bad:
            return BadRecord(step, source.name, number, key, bad.cause, bad.detail)
        return Fetched(step, source.name, number, dataset, row, seed, record, data)

    def decode(self, fetched: Fetched | BadRecord, out: Tensor | None = None) -> Sample | BadRecord:
        """The second half."""
        if isinstance(fetched, BadRecord):
            return fetched
        step, source, number, dataset, row, seed, record, data = fetched
        image = None
        if data is not None:
            torch.default_generator.manual_seed(seed)
            try:
                pixels = decode_by(
                    self.decoder, data, max_pixels=self.limits.max_pixels, target=self.target
                )
                image = self.transform(pixels) if out is None else self.transform(pixels, out)
            except BadSample as bad:
                return BadRecord(step, source, number, record.key, bad.cause, bad.detail)
        return Sample(
            image,
            record.caption,
            record.image_id,
            record.caption_id,
            dataset,
            row,
            record.label,
            None if self.seed is None else seed,
            record.turns,
            record.answers,
            record.labels,
        )
