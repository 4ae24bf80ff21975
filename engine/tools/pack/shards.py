"""A shard: read from the source, written, read back, and marked as finished."""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from engine.data.bad_samples import BadRecord
from engine.data.groups import Groups
from engine.data.image_files import MAX_IMAGE_BYTES, ending_of, read_bytes
from engine.errors import FaultError
from engine.logs.samples import write_whole
from engine.tools.jobs import Tick
from engine.tools.pack.forms import COLUMNS, Form
from engine.types import BadSample, EncodedImage, Row, Source

Unit = tuple[bytes, str, list[Row]]  # an image, its ending, and rows that show it
_NUM_DETAIL = 300  # characters of a bad sample's detail
_PRIME = (1 << 127) - 1
_BASE = 0x2545F4914F6CDD1D9E3779B97F4A7C15


@dataclass(frozen=True, slots=True)
class Digest:
    """A check sum of ``length`` samples: Σ hᵢ·bⁿ⁻¹⁻ⁱ modulo 2¹²⁷ − 1, of the samples' hashes hᵢ.

    Equal for equal samples in the same order, in whatever form they are stored. The digests of
    neighbouring parts can be added, so that many processes may each take a part.
    """

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


def sample_digest(record: Row, image: bytes) -> Digest:
    """Of one sample, its image given by ``image_digest``, or by b"" where it has none.

    Spaces around a caption do not count, since readers of shards take them off. The key does not
    count, since files get new names.
    """
    content = (
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
    hashed = hashlib.blake2b(repr(content).encode(errors="surrogatepass"), digest_size=15)
    return Digest(1, int.from_bytes(hashed.digest(), "big"))


@dataclass(frozen=True)
class Plan:
    """A split's samples in the order in which they are packed, cut into shards.

    ``groups`` are the rows of each image, which stay in one shard; None where each row is an image
    of its own.
    """

    source: Source
    groups: Groups | None
    form: Form

    @property
    def num_images(self) -> int:
        return len(self.source if self.groups is None else self.groups)

    @property
    def shards(self) -> range:
        return range(-(-self.num_images // self.form.shard_size))

    def units(self, shard: int) -> Iterator[list[int]]:
        """The rows of each image of a shard."""
        first = shard * self.form.shard_size
        for image in range(first, min(first + self.form.shard_size, self.num_images)):
            yield [image] if self.groups is None else self.groups[image].tolist()


@dataclass
class Shard:
    """What a shard holds, as its ``_stats.json`` has it."""

    number: int
    samples: int = 0
    images: int = 0
    bytes: int = 0  # of its file, or of its images and rows
    sha256: str = ""
    digest: Digest = field(default_factory=Digest)
    columns: list[str] = field(default_factory=list)  # of a CSV, those that have any values
    shortened: int = 0  # samples of which a CSV keeps a part
    bad: list[BadRecord] = field(default_factory=list)
    how: str = "packed"  # packed | kept | repaired


def pack_shard(plan: Plan, number: int, tick: Tick) -> Shard:
    """Keep the shard if it is finished and undamaged, else make it. Raises FaultError where what
    was written cannot be read back."""
    known = read_stats(plan.form.stats(number), number)
    if known is not None and plan.form.checksum(number) == (known.bytes, known.sha256):
        tick(sum(map(len, plan.units(number))))
        known.how = "kept"
        return known
    plan.form.stats(number).unlink(missing_ok=True)
    made = _make(plan, number, tick)
    made.how = "packed" if known is None else "repaired"
    return made


def _make(plan: Plan, number: int, tick: Tick) -> Shard:
    shard, form, started = Shard(number), plan.form, time.time()
    columns: set[str] = set()
    with form.writing(number) as add:
        for image, ending, records in _units(plan, shard, tick):
            image_hash = image_digest(image) if ending else b""
            shard.images += bool(ending)
            shard.samples += len(records)
            for record in records:
                shard.digest += sample_digest(record, image_hash)
                columns.update(form.columns(record))
            add(image, ending, records)
    shard.columns = [column for column in COLUMNS if column in columns]
    found = form.checksum(number)
    if found is None:
        raise FaultError(f"{form.content(number)} cannot be read back after it was written")
    shard.bytes, shard.sha256 = found
    _write_stats(form.stats(number), shard, started)
    return shard


def _units(plan: Plan, shard: Shard, tick: Tick) -> Iterator[Unit]:
    """The shard's samples in order; those that cannot be used go to ``shard.bad``."""
    form = plan.form
    for rows in plan.units(shard.number):
        unit: Unit | None = None
        shown: EncodedImage | None = None
        for row in rows:
            key = f"row {row + 1}"
            try:
                record = plan.source[row]
                key = record.key
                own = record.images[0] if record.images else b""
                if unit and isinstance(own, Path) and own == shown:
                    image, ending = unit[:2]
                else:
                    image, ending = _image(record, form)
                    shown = own
            except BadSample as bad:
                shard.bad.append(
                    BadRecord(None, plan.source.name, row, key, bad.cause, bad.detail[:_NUM_DETAIL])
                )
                continue
            kept = form.keep(record)
            shard.shortened += kept != record
            if unit and unit[0] == image and form.together(unit[2][0], kept):
                unit[2].append(kept)
                continue
            if unit:
                yield unit
            unit = image, ending, [kept]
        if unit:
            yield unit
        tick(len(rows))


def _image(record: Row, form: Form) -> tuple[bytes, str]:
    if len(record.images) > 1:
        raise BadSample("several images", f"{len(record.images)}; a packed sample has one at most")
    if not record.images:
        if not (form.holds_text_alone and record.turns):
            why = "" if form.holds_text_alone else ", which CSV cannot hold"
            raise BadSample("no image", f"text alone{why}")
        return b"", ""
    data = read_bytes(record.images[0])
    if len(data) > MAX_IMAGE_BYTES:
        raise BadSample(
            "too large", f"{len(data)} bytes; no shard may hold more than {MAX_IMAGE_BYTES}"
        )
    return data, ending_of(data)


def read_stats(path: Path, number: int) -> Shard | None:
    """A finished shard by its statistics file; None for one that is not finished."""
    try:
        stored = json.loads(path.read_bytes())["packed"]
        bad = [BadRecord(**each) for each in stored.pop("bad")]
        digest = Digest(stored["samples"], int(stored.pop("digest"), 16))
        return Shard(**{**stored, "number": number, "digest": digest, "bad": bad})
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def _write_stats(path: Path, shard: Shard, started: float) -> None:
    """In img2dataset's form, with what this engine needs under ``packed``."""
    causes = Counter(bad.cause for bad in shard.bad)
    packed = {**asdict(shard), "digest": str(shard.digest)}
    del packed["number"], packed["how"]
    stats = {
        "count": shard.images + len(shard.bad),
        "successes": shard.images,
        "failed_to_download": len(shard.bad),
        "failed_to_resize": 0,
        "start_time": started,
        "end_time": time.time(),
        "duration": time.time() - started,
        "status_dict": {"success": shard.images, **causes},
        "packed": packed,
    }
    write_whole(path, json.dumps(stats, ensure_ascii=False, indent=1))


def check_shard(packed: Source, item: tuple[int, Digest, str], tick: Tick) -> tuple[int, Digest]:
    """The digest of a shard's samples, read as a run reads them from row ``item[0]`` on.

    Raises FaultError, naming the shard, where it is not the one expected.
    """
    first, expected, named = item
    digest = Digest()
    for row in range(first, first + expected.length):
        try:
            record = packed[row]
            image = image_digest(read_bytes(record.images[0])) if record.images else b""
        except BadSample as bad:
            raise FaultError(
                f"{named}: sample {row - first + 1} cannot be read back: {bad}"
            ) from None
        digest += sample_digest(record, image)
        tick(1)
    if digest != expected:
        raise FaultError(
            f"{named} does not hold what was read from the source: digest {digest}, expected "
            f"{expected}; remove it and pack again"
        )
    return first, digest
