"""One shard: read from the source, written, read back, and marked as finished."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from engine.data.bad_samples import BadRecord
from engine.data.image_files import ending_of, read_bytes
from engine.data.pack import text as pack_text
from engine.data.pack.digest import Digest, image_digest, sample_digest
from engine.data.pack.plan import Plan, write_whole
from engine.data.pack.writers import WRITERS, checksum
from engine.data.tar.samples import MAX_IMAGE_BYTES
from engine.errors import FaultError
from engine.tools.jobs import Tick
from engine.types import BadSample, Record

Unit = tuple[bytes, str, list[Record]]  # an image, its ending, and rows that show it
_NUM_DETAIL = 300  # characters of a bad sample's detail


@dataclass
class Shard:
    """What a shard holds, as its ``_stats.json`` tells."""

    number: int
    samples: int = 0
    images: int = 0
    bytes: int = 0  # of its file, or of its images and rows
    sha256: str = ""
    digest: Digest = field(default_factory=Digest)
    columns: list[str] = field(default_factory=list)  # of a CSV, those that hold anything
    shortened: int = 0  # samples of which a CSV keeps a part
    bad: list[BadRecord] = field(default_factory=list)
    how: str = "packed"  # packed | kept | mended


def pack_shard(plan: Plan, number: int, tick: Tick) -> Shard:
    """Keep the shard if it is finished and undamaged, else make it. Raises FaultError where what
    was written cannot be read back."""
    known = read_stats(plan, number)
    if known is not None and checksum(plan, number) == (known.bytes, known.sha256):
        tick(sum(map(len, plan.units(number))))
        known.how = "kept"
        return known
    plan.stats(number).unlink(missing_ok=True)
    made = _make(plan, number, tick)
    made.how = "packed" if known is None else "mended"
    return made


def _make(plan: Plan, number: int, tick: Tick) -> Shard:
    shard, started = Shard(number), time.time()
    columns: set[str] = set()
    with WRITERS[plan.to](plan, number) as writer:
        for image, ending, records in _units(plan, shard, tick):
            image_hash = image_digest(image) if ending else b""
            shard.images += bool(ending)
            shard.samples += len(records)
            for record in records:
                shard.digest += sample_digest(record, image_hash)
                columns.update(_columns(record) if plan.to == "csv" else ())
            writer.add(image, ending, records)
    shard.columns = [column for column in pack_text.COLUMNS if column in columns]
    found = checksum(plan, number)
    if found is None:
        raise FaultError(f"{plan.content(number)} cannot be read back after it was written")
    shard.bytes, shard.sha256 = found
    _write_stats(plan, shard, started)
    return shard


def _units(plan: Plan, shard: Shard, tick: Tick) -> Iterator[Unit]:
    """The shard's samples in order; those that cannot be used go to ``shard.bad``."""
    for rows in plan.units(shard.number):
        unit: Unit | None = None
        shown: Path | None = None
        for row in rows:
            key = f"row {row + 1}"
            try:
                record = plan.source[row]
                key = record.key
                if unit and isinstance(record.image, Path) and record.image == shown:
                    image, ending = unit[:2]
                else:
                    image, ending = _image(record, plan.to)
                    shown = record.image if isinstance(record.image, Path) else None
            except BadSample as bad:
                shard.bad.append(
                    BadRecord(None, plan.source.name, row, key, bad.cause, bad.detail[:_NUM_DETAIL])
                )
                continue
            if plan.to == "csv":
                kept = pack_text.as_csv_has_it(record)
                shard.shortened += kept != record
                record = kept
            if unit and unit[0] == image and _together(plan.to, unit[2][0], record):
                unit[2].append(record)
                continue
            if unit:
                yield unit
            unit = image, ending, [record]
        if unit:
            yield unit
        tick(len(rows))


def _image(record: Record, to: str) -> tuple[bytes, str]:
    if record.more_images:
        raise BadSample(
            "several images", f"{1 + len(record.more_images)}; a packed sample has one at most"
        )
    if record.image is None:
        if to == "csv" or not record.turns:
            raise BadSample("no image", "text alone" + (", which CSV cannot hold" * (to == "csv")))
        return b"", ""
    data = read_bytes(record.image)
    if len(data) > MAX_IMAGE_BYTES:
        raise BadSample(
            "too large", f"{len(data)} bytes; no shard may hold more than {MAX_IMAGE_BYTES}"
        )
    return data, ending_of(data)


def _together(to: str, first: Record, record: Record) -> bool:
    """Whether two rows of the same image are written with it once."""
    if to == "csv":
        return True
    return bool(record.image) and pack_text.same_but_caption(first, record)


def _columns(record: Record) -> Sequence[str]:
    values = pack_text.csv_row("image", record)
    always = ("image_id", "caption", "caption_id")
    return [
        name
        for name, value in zip(pack_text.COLUMNS, values, strict=True)
        if value or name in always
    ]


def read_stats(plan: Plan, number: int) -> Shard | None:
    """What a finished shard says of itself; None for one that is not finished."""
    try:
        told = json.loads(plan.stats(number).read_bytes())["packed"]
        bad = [BadRecord(**each) for each in told.pop("bad")]
        digest = Digest(told["samples"], int(told.pop("digest"), 16))
        return Shard(**{**told, "number": number, "digest": digest, "bad": bad})
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def _write_stats(plan: Plan, shard: Shard, started: float) -> None:
    """In img2dataset's form, with what this engine wants to know under ``packed``."""
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
    write_whole(plan.stats(shard.number), json.dumps(stats, ensure_ascii=False, indent=1))
