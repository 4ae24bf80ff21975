"""A shard: read from the source, written, read back, and marked as finished."""

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
from engine.types import BadSample, Row, Source

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

    def __add__(self, other: "Digest") -> "Digest":
        """That of these samples followed by the other ones."""
        moved = self.value * pow(_BASE, other.length, _PRIME)
        return Digest(self.length + other.length, (moved + other.value) % _PRIME)

    def __str__(self) -> str:
        return f"{self.value:032x}"


def image_digest(data: bytes) -> bytes:
    """Of an image's bytes, as ``sample_digest`` takes it."""
    return hashlib.blake2b(data, digest_size=16).digest()


def sample_digest(row: Row, image: bytes) -> Digest:
    """Of one sample, its image given by ``image_digest``, or by b"" where it has none.

    Spaces around a caption do not count, since readers of shards take them off. The key does not
    count, since files get new names.
    """
    texts = row.caption.strip(), row.image_id, row.caption_id, row.turns, row.answers
    # Kinds came later: digests of rows without any are what they were.
    kinds = (row.question_type, row.answer_type)[
        : 2 if row.answer_type else bool(row.question_type)
    ]
    content = (image, *texts, row.labels, row.label, *kinds)
    hashed = hashlib.blake2b(repr(content).encode(errors="surrogatepass"), digest_size=15)
    return Digest(1, int.from_bytes(hashed.digest(), "big"))


@dataclass(frozen=True)
class Plan:
    """A split's samples, cut into shards: the images in order, each with all of its rows."""

    source: Source
    groups: Groups
    form: Form

    @property
    def shards(self) -> range:
        return range(-(-len(self.groups) // self.form.shard_size))

    def units(self, shard: int) -> Iterator[list[int]]:
        """The rows of each image of a shard."""
        first = shard * self.form.shard_size
        for image in range(first, min(first + self.form.shard_size, len(self.groups))):
            yield self.groups[image].tolist()


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
    form, stats, started = plan.form, plan.form.stats(number), time.time()
    known = _read_stats(stats, number)
    if known is not None and form.checksum(number) == (known.bytes, known.sha256):
        tick(sum(map(len, plan.units(number))))
        return known
    stats.unlink(missing_ok=True)
    shard = Shard(number, how="packed" if known is None else "repaired")
    columns: set[str] = set()
    with form.writing(number) as add:
        for place, (image, ending, rows) in enumerate(_units(plan, shard, tick)):
            image_hash = image_digest(image) if ending else b""
            shard.images += bool(ending)
            shard.samples += len(rows)
            for row in rows:
                shard.digest += sample_digest(row, image_hash)
                columns.update(form.columns(row))
            add(form.key(number, place), image, ending, rows)
    shard.columns = sorted(columns, key=COLUMNS.index)
    written = form.checksum(number)
    if written is None:
        raise FaultError(f"{form.content(number)} cannot be read back after it was written")
    shard.bytes, shard.sha256 = written
    _write_stats(stats, shard, started)
    return shard


def _units(plan: Plan, shard: Shard, tick: Tick) -> Iterator[tuple[bytes, str, list[Row]]]:
    """The shard's images in order, each with its ending and rows that show it; rows that cannot be
    used go to ``shard.bad``."""
    form = plan.form
    for numbers in plan.units(shard.number):
        image, ending, rows, shown = b"", "", list[Row](), None
        for number in numbers:
            key = f"row {number + 1}"
            try:
                row = plan.source[number]
                key = row.key
                same = bool(rows and row.images) and row.images == shown
                data, kind = (image, ending) if same else _image(row, form)
            except BadSample as bad:
                detail = bad.detail[:_NUM_DETAIL]
                record = BadRecord(None, plan.source.name, number, key, bad.cause, detail)
                shard.bad.append(record)
                continue
            shown, kept = row.images, form.keep(row)
            shard.shortened += kept != row
            if rows and not (data == image and form.together(rows[0], kept)):
                yield image, ending, rows
                rows = []
            image, ending = data, kind
            rows.append(kept)
        if rows:
            yield image, ending, rows
        tick(len(numbers))


def _image(row: Row, form: Form) -> tuple[bytes, str]:
    if len(row.images) > 1:
        raise BadSample("several images", f"{len(row.images)}; a packed sample has one at most")
    if not row.images:
        if not (form.holds_text_alone and row.turns):
            why = "" if form.holds_text_alone else ", which CSV cannot hold"
            raise BadSample("no image", f"text alone{why}")
        return b"", ""
    data = read_bytes(row.images[0])
    if len(data) > MAX_IMAGE_BYTES:
        raise BadSample(
            "too large", f"{len(data)} bytes; no shard may hold more than {MAX_IMAGE_BYTES}"
        )
    return data, ending_of(data)


def _read_stats(path: Path, number: int) -> Shard | None:
    """A finished shard by its statistics file; None for one that is not finished."""
    try:
        stored = json.loads(path.read_bytes())["packed"]
        bad = [BadRecord(**each) for each in stored.pop("bad")]
        digest = Digest(stored["samples"], int(stored.pop("digest"), 16))
        return Shard(number=number, digest=digest, bad=bad, how="kept", **stored)
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


def check_shard(packed: Source, item: tuple[int, Digest, Path], tick: Tick) -> Digest:
    """The digest of a shard's samples, read as a run reads them from row ``item[0]`` on.

    Raises FaultError, naming the shard, where it is not the one expected.
    """
    first, expected, named = item
    digest = Digest()
    for number in range(first, first + expected.length):
        try:
            row = packed[number]
            image = image_digest(read_bytes(row.images[0])) if row.images else b""
        except BadSample as bad:
            place = number - first + 1
            raise FaultError(f"{named}: sample {place} cannot be read back: {bad}") from None
        digest += sample_digest(row, image)
        tick(1)
    if digest != expected:
        raise FaultError(
            f"{named} does not hold what was read from the source: digest {digest}, expected "
            f"{expected}; remove it and pack again"
        )
    return digest
