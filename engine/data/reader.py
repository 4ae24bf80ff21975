"""One row of a dataset → a decoded, transformed sample, or the reason why not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from engine.config.schema import Data
from engine.data.bad_samples import BadRecord
from engine.data.batch_memory import BatchBuffer
from engine.data.decode import decode_by
from engine.data.image_files import read_image
from engine.data.permutation import hash64
from engine.data.transforms.pipeline import Pipeline
from engine.data.views import Draw, origin
from engine.types import BadSample, Row, Sample, Source, Task


@dataclass(frozen=True, slots=True)
class Limits:
    """What a sample may be at most; ``text_alone``: whether one without an image is of use.

    ``max_images`` of a sample are decoded at most, each of at most ``max_pixels``.
    ``usable`` raises BadSample for a row whose text the task cannot learn from.
    """

    max_pixels: int = 178_956_970  # Pillow's bound for a decompression bomb
    max_caption_chars: int = 100_000
    text_alone: bool = False
    usable: Callable[[Row], None] | None = None
    max_images: int = 16

    def check(self, row: Row) -> None:
        """Raises BadSample."""
        if not row.images and not self.text_alone:
            raise BadSample("no image")
        if (count := len(row.images)) > self.max_images:
            raise BadSample("too many images", f"{count}, data.max_images {self.max_images}")
        longest = max([len(row.caption), *(len(text) for _, text in row.turns)])
        if longest > self.max_caption_chars:
            raise BadSample(
                "caption too long",
                f"{longest} characters, data.max_caption_chars {self.max_caption_chars}",
            )
        if self.usable is not None:
            self.usable(row)


def limits_of(data: Data, task: Task | None = None) -> Limits:
    """What ``data`` allows of a sample, and in training also what the task asks of it."""
    return Limits(
        data.max_image_pixels,
        data.max_caption_chars,
        text_alone=task is not None and task.text_alone,
        usable=None if task is None else task.usable,
        max_images=data.max_images,
    )


Transform = Callable[..., Tensor]  # a Pipeline, or of a PIL image alone


class Fetched(NamedTuple):
    """A row whose images are still encoded."""

    step: int
    source: str
    number: int  # of the row in that source, where ``dataset`` and ``row`` name it in a view
    dataset: int
    row: int
    seed: int
    record: Row
    data: tuple[bytes, ...]  # of each image


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
        self, step: int, epoch: int, dataset: int, row: int, buffer: BatchBuffer | None = None
    ) -> Sample | BadRecord:
        """The sample at a row, its images written to ``buffer`` where it is given.

        Reseeds torch's global CPU generator, which the caller restores.
        """
        return self.decode(self.fetch(step, epoch, dataset, row), buffer)

    def fetch(self, step: int, epoch: int, dataset: int, row: int) -> Fetched | BadRecord:
        """The first half of ``read``, up to the images' bytes."""
        draw = None if self.seed is None else Draw(self.seed, epoch)
        # Of a view, the row in the dataset itself: what a message has to name.
        source, number = origin(self.sources[dataset], row, draw)
        key = f"row {number}"
        try:
            record = source[number]
            key = record.key
            data = self.encoded(record)
        except BadSample as bad:
            return BadRecord(step, source.name, number, key, bad.cause, bad.detail)
        seed = self.seed_of(epoch, dataset, row)
        return Fetched(step, source.name, number, dataset, row, seed, record, data)

    def encoded(self, record: Row) -> tuple[bytes, ...]:
        """The bytes of each image. Raises BadSample for a row that may not be used."""
        self.limits.check(record)
        return tuple(map(read_image, record.images))

    def seed_of(self, epoch: int, dataset: int, row: int) -> int:
        """What a sample's random transforms depend on."""
        return hash64(self.seed or 0, epoch, dataset, row) >> 1  # 63 bits: any generator takes it

    def decode(
        self, fetched: Fetched | BadRecord, buffer: BatchBuffer | None = None
    ) -> Sample | BadRecord:
        """The second half. One image that cannot be used makes the sample bad."""
        if isinstance(fetched, BadRecord):
            return fetched
        step, source, number, dataset, row, seed, record, data = fetched
        images: list[Tensor] = []
        if data:
            torch.default_generator.manual_seed(seed)
        for place, encoded in enumerate(data):
            out = None if buffer is None else buffer.reserve(place)
            try:
                images.append(self._image(encoded, out))
            except BadSample as bad:
                which = f"image {place + 1} of {len(data)}: " if len(data) > 1 else ""
                return BadRecord(step, source, number, record.key, bad.cause, which + bad.detail)
        if buffer is not None:
            buffer.commit(len(images))
        return Sample(record, tuple(images), dataset, row, None if self.seed is None else seed)

    def _image(self, encoded: bytes, out: Tensor | None) -> Tensor:
        pixels = decode_by(
            self.decoder, encoded, max_pixels=self.limits.max_pixels, target=self.target
        )
        return self.transform(pixels) if out is None else self.transform(pixels, out)
