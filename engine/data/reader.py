"""One row of a dataset → a decoded, transformed sample, or the reason why not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from PIL import Image
from torch import Tensor

from engine.data.bad_samples import BadRecord
from engine.data.decode import decode
from engine.data.permutation import hash64
from engine.types import BadSample, Sample, Source

Transform = Callable[[Image.Image], Tensor]


class Reader:
    """Rows → samples; the randomness of each depends on (seed, epoch, dataset, row) alone.

    Without a seed a sample carries none, and random transforms repeat from epoch to epoch.
    """

    def __init__(
        self,
        sources: Sequence[Source] | Mapping[int, Source],
        transform: Transform,
        seed: int | None,
        max_pixels: int,
    ) -> None:
        self.sources, self.transform = sources, transform
        self.seed, self.max_pixels = seed, max_pixels
        # A pipeline knows how far an image may shrink in decoding; another callable need not.
        self.target = getattr(transform, "decode_size", None)

    def read(self, step: int, epoch: int, dataset: int, row: int) -> Sample | BadRecord:
        """The sample at a row; reseeds torch's global CPU generator, which the caller restores."""
        source, key = self.sources[dataset], f"row {row}"
        seed = hash64(self.seed or 0, epoch, dataset, row) >> 1  # 63 bits: any generator takes it
        try:
            record = source[row]
            key = record.key
            image = None
            if record.image is not None:
                torch.default_generator.manual_seed(seed)
                image = self.transform(
                    decode(record.image, max_pixels=self.max_pixels, target=self.target)
                )
        except BadSample as bad:
            return BadRecord(step, source.name, row, key, bad.cause, bad.detail)
        return Sample(
            image,
            record.caption,
            record.image_id,
            record.caption_id,
            dataset,
            row,
            record.label,
            None if self.seed is None else seed,
        )
