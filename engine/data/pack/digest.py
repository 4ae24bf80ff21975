"""A check sum of a sequence of samples: equal for equal samples in the same order.

It does not hang on the form that they are stored in, and those of neighbouring parts can be put
together, so that many processes may each take a part.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from engine.types import Record

_PRIME = (1 << 127) - 1
_BASE = 0x2545F4914F6CDD1D9E3779B97F4A7C15


@dataclass(frozen=True, slots=True)
class Digest:
    """Of ``length`` samples: Σ hᵢ·bⁿ⁻¹⁻ⁱ modulo 2¹²⁷ − 1, of the samples' own hashes hᵢ."""

    length: int = 0
    value: int = 0

    def __add__(self, other: Digest) -> Digest:
        """That of these samples followed by the other ones."""
        moved = self.value * pow(_BASE, other.length, _PRIME)
        return Digest(self.length + other.length, (moved + other.value) % _PRIME)

    def __str__(self) -> str:
        return f"{self.value:032x}"


def image_digest(data: bytes) -> bytes:
    """Of an image's bytes, as ``sample_digest`` takes it."""
    return hashlib.blake2b(data, digest_size=16).digest()


def sample_digest(record: Record, image: bytes) -> Digest:
    """Of one sample, its image given by ``image_digest``, or by b"" where it has none.

    Spaces around a caption do not count, since readers of shards take them off. The key does not
    count, since files get new names.
    """
    told = (
        image,
        record.caption.strip(),
        record.image_id,
        record.caption_id,
        record.turns,
        record.answers,
        record.labels,
        record.label,
        *((record.question_type,) if record.question_type or record.answer_type else ()),
        *((record.answer_type,) if record.answer_type else ()),
    )
    hashed = hashlib.blake2b(repr(told).encode(errors="surrogatepass"), digest_size=15)
    return Digest(1, int.from_bytes(hashed.digest(), "big"))
