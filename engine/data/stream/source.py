"""Datasets whose shards are not at hand: read from front to end, never by row.

A training split of remote shards is streamed. A validation split is read in any order and more than
once, so its shards are copied into the cache folder and read there.

webdataset groups the members of a shard into samples; it neither opens (its ``pipe:`` runs a shell)
nor decodes (its default decoder unpickles): members come out as bytes, and only those with named
extensions are read.
"""

import hashlib
import json
import os
import re
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from engine.data.cache import build_cached
from engine.data.image_files import ENDINGS, MAX_IMAGE_BYTES
from engine.data.stream.open import Shard
from engine.data.tables.paths import OUTSIDE
from engine.data.tar.texts import TextForm, read_texts
from engine.data.tar.urls import is_remote
from engine.errors import UserError
from engine.logs.progress import Progress
from engine.types import BadSample, Row

WHOLE_SHARD = (1 << 32) - 1  # in place of a sample's number, where the shard itself is at fault
_READ = 1 << 17  # bytes asked for at once
_MAX_NAME = 1 << 20  # bytes of an extended header
_LONG_NAMES = (
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
)
_SHIFT = 32  # a row's number is the shard's number shifted by this, and the number in the shard
_THREADS = 8  # shards at once
_CHUNK = 1 << 20  # bytes
_MAX_STATISTICS = 1 << 20  # bytes of a _stats.json


@dataclass(frozen=True, slots=True)
class Item:
    """A row of a shard, or why it (or all that follows in the shard) cannot be used."""

    number: int  # of the row in its shard; WHOLE_SHARD where the shard broke off
    key: str
    row: Row | None
    bad: BadSample | None = None


@dataclass
class Stream:
    """The training split of a dataset of streamed shards.

    ``length`` is the number of its samples where it is known, else they are counted once.
    ``window`` is the number of samples within which a reader shuffles.
    """

    name: str
    urls: Sequence[str]
    form: TextForm
    window: int
    cache_dir: Path
    length: int | None = None
    split: str = "train"

    def __len__(self) -> int:
        return self._counted if self.length is None else self.length

    @property
    def identity(self) -> str:
        """Equal for streams whose samples come in the same order."""
        return f"{_digest(self.urls)}, window {self.window}"

    def read(self, shard: int) -> Iterator[Item]:
        """The samples of a shard in order, and at the end what is wrong with it."""
        return read_shard(self.urls[shard], self.form)

    def captions(self) -> Iterator[str]:
        """All captions in order, by a pass over all shards."""
        for shard in range(len(self.urls)):
            for item in self.read(shard):
                if item.row is not None:
                    yield item.row.caption

    def place(self, row: int) -> str:
        """A row as a message names it: ``URL#number of the sample``."""
        shard, number = row >> _SHIFT, row & WHOLE_SHARD
        return self.urls[shard] + ("" if number == WHOLE_SHARD else f"#{number}")

    @cached_property
    def _counted(self) -> int:
        """Samples in all shards: as img2dataset's ``_stats.json`` state, else counted by one pass.

        The number is kept in ``cache_dir``. Raises UserError where a shard cannot be read.
        """
        target = self.cache_dir / "streams" / f"{_digest(self.urls)}.json"
        try:
            build_cached(target, self._write_count)
            return int(json.loads(target.read_text("utf8"))["samples"])
        except OSError as error:
            raise UserError(
                f"the number of samples of {self.name!r} cannot be kept in {target.parent} "
                f"({error.strerror}); give length: N for this dataset"
            ) from error

    def _write_count(self, path: Path) -> None:
        with ThreadPoolExecutor(_THREADS) as pool:
            counts = list(pool.map(_stated, self.urls))
            unknown = [number for number, count in enumerate(counts) if count is None]
            if unknown:
                Progress().message(
                    f"{self.name}: counting the samples of {len(unknown)} shards by reading them "
                    "once (length: N for this dataset saves it)"
                )
            counts += pool.map(self._count, unknown)
        samples = sum(filter(None, counts))
        path.write_text(json.dumps({"samples": samples, "shards": len(self.urls)}), "utf8")

    def _count(self, shard: int) -> int:
        count, last = 0, None
        for last in self.read(shard):
            count += last.number != WHOLE_SHARD
        if last is None:
            raise UserError(f"the shard {self.urls[shard]} holds no sample")
        if last.bad is not None and not count:
            raise UserError(f"a shard cannot be counted: {last.bad}; repair it, or give length: N")
        return count


def row_of(shard: int, number: int) -> int:
    """The number of a row, by its shard's number and its own in the shard."""
    return shard << _SHIFT | number


def _digest(urls: Sequence[str]) -> str:
    """A short name of a list of shards."""
    return hashlib.blake2b("\n".join(urls).encode(), digest_size=8).hexdigest()


def _stated(url: str) -> int | None:
    """The count of the statistics file beside a shard, where there is one."""
    beside = re.sub(r"\.tar$", "_stats.json", url)
    if beside == url or url.startswith("pipe:"):
        return None
    try:
        with Shard(beside) as file:
            return int(json.loads(file.read(_MAX_STATISTICS))["successes"])
    except (BadSample, ValueError, KeyError, TypeError):
        return None


class _Header(tarfile.TarInfo):
    """A header that is torn is an error: tarfile itself takes it for the archive's end."""

    @classmethod
    def frombuf(cls, buf: Any, encoding: str, errors: str) -> Any:
        try:
            header = super().frombuf(buf, encoding, errors)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.InvalidHeaderError as error:  # type: ignore[attr-defined]
            raise BadSample("torn header", str(error)) from None
        except tarfile.HeaderError as error:
            raise BadSample("truncated shard", f"{error}, without an end mark") from None
        if header.type in _LONG_NAMES and header.size > _MAX_NAME:
            raise BadSample("torn header", f"a name of {header.size:,} bytes")
        return header


def read_shard(url: str, form: TextForm) -> Iterator[Item]:
    """The rows of a shard in order; what is wrong with the shard itself comes last.

    A sample has a row for each of its captions. One that the break made incomplete is left out.
    """
    # Nothing of webdataset that could open or unpickle is called; this locks it as well.
    os.environ.setdefault("WDS_SECURE", "1")
    from webdataset.tariterators import group_by_keys

    broken: list[BadSample] = []
    held: list[Item] = []
    number = 0
    with Shard(url) as shard:
        # A second member of the same name and extension is skipped: the first one counts.
        members = _members(shard, form, broken)
        for sample in group_by_keys(members, handler=lambda error: True):
            yield from held
            held = _items(number, sample, form)
            number += len(held)
        if not (broken and held and held[0].bad):
            yield from held
        for bad in broken:
            yield Item(WHOLE_SHARD, url, None, bad)


def _members(shard: Shard, form: TextForm, broken: list[BadSample]) -> Iterator[dict[str, Any]]:
    """Files as webdataset's grouping takes them; why the shard breaks off goes to ``broken``.

    Links, devices and sparse files are skipped.
    """
    endings = {*ENDINGS, form.text.lower(), "json"}
    try:
        # Of a file object the stream needs nothing but read.
        with tarfile.open(  # type: ignore[call-overload]
            fileobj=shard, mode="r|*", tarinfo=_Header, bufsize=_READ
        ) as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # else it keeps every header of the shard
                plain = member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and not member.sparse
                ending = member.name.rpartition("/")[2].partition(".")[2].lower()
                if not plain or ending not in endings:
                    continue
                file = tar.extractfile(member) if member.size <= MAX_IMAGE_BYTES else None
                data = file.read() if file is not None else None  # None: too large
                yield {"fname": member.name, "data": data, "__url__": shard.url}
    except BadSample as bad:
        broken.append(bad)
    except (tarfile.TarError, EOFError, OSError, ValueError, zlib.error) as error:
        broken.append(BadSample("truncated shard", str(error)))


def _items(number: int, sample: dict[str, Any], form: TextForm) -> list[Item]:
    """The rows of a sample of a shard, numbered from ``number`` on, or why it cannot be used."""
    key = str(sample["__key__"])
    image = next((sample[ending] for ending in sample if ending in ENDINGS), None)
    try:
        texts = _texts(key, sample, form)
        if image is None and not texts[0].turns:
            raise BadSample("missing image", f"its {form.text} or json is there alone")
    except BadSample as bad:
        return [Item(number, key, None, bad)]
    images = () if image is None else (image,)
    rows = (
        replace(
            row,
            key=key,
            images=images,
            image_id=row.image_id or key,
            caption_id=row.caption_id or f"{key}#{place}",
        )
        for place, row in enumerate(texts)
    )
    return [Item(place, key, row) for place, row in enumerate(rows, number)]


def _texts(key: str, sample: dict[str, Any], form: TextForm) -> list[Row]:
    if re.search(OUTSIDE, key):
        raise BadSample("outside root", "its name leads out of the shard")
    for ending, data in sample.items():
        if data is None:
            raise BadSample("too large", f"its {ending}")
    text, fields = sample.get(form.text.lower()), sample.get("json")
    if text is None and fields is None:
        raise BadSample("no caption", f"it has no {form.text} and no json")
    return read_texts(text, fields, form)


def copy_shards(urls: Sequence[str], *, name: str, cache_dir: Path) -> list[str]:
    """Local copies under ``cache_dir``, made once, of those shards that are not local already.

    Raises UserError for a shard that cannot be read, and where nothing can be written.
    """
    folder = cache_dir / "streams" / _digest(urls)
    copies = {}
    for number, url in enumerate(urls):
        if is_remote(url):
            base = re.sub(r"[^\w.-]+", "_", url.removesuffix(".tar"))[-80:]
            copies[url] = folder / f"{number:05d}_{base}.tar"
    missing = [url for url, copy in copies.items() if not copy.exists()]
    if missing:
        Progress().message(f"{name}: copying {len(missing)} shards to {folder}")
    try:
        with ThreadPoolExecutor(_THREADS) as pool:
            list(pool.map(lambda url: build_cached(copies[url], partial(_copy, url)), missing))
    except BadSample as bad:
        raise UserError(f"dataset {name!r}: a shard cannot be copied: {bad}") from bad
    except OSError as error:
        raise UserError(f"dataset {name!r}: no copies can be kept in {folder}: {error}") from error
    return [str(copies.get(url, Path(url))) for url in urls]


def _copy(url: str, path: Path) -> None:
    with Shard(url) as shard, path.open("wb") as file:
        while data := shard.read(_CHUNK):
            file.write(data)
