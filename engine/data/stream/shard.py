"""One pass over a tar shard as it arrives: members, grouped into samples by webdataset.

webdataset groups; it neither opens (its ``pipe:`` runs a shell) nor decodes (its default decoder
unpickles): members come out as bytes, and only those with named extensions are looked at.
"""

from __future__ import annotations

import os
import re
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from engine.data.image_files import ENDINGS, MAX_IMAGE_BYTES
from engine.data.stream.open import Shard, open_shard
from engine.data.tables.image_root import OUTSIDE
from engine.data.tar.texts import TextForm, read_texts
from engine.types import BadSample, Row

WHOLE_SHARD = (1 << 32) - 1  # stands for the number of a sample where the shard itself is at fault
_READ = 1 << 17  # bytes asked for at once
_MAX_NAME = 1 << 20  # bytes of an extended header
_LONG_NAMES = (
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
)


@dataclass(frozen=True, slots=True)
class Item:
    """A row of a shard, or why it (or all that follows in the shard) cannot be used."""

    number: int  # of the row in its shard; WHOLE_SHARD where the shard broke off
    key: str
    record: Row | None
    bad: BadSample | None = None


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


class _Members:
    """Files of a tar stream as webdataset's grouping takes them; ``error`` says why it broke off.

    Links, devices and sparse files are passed over.
    """

    def __init__(self, shard: Shard, form: TextForm) -> None:
        self.shard = shard
        self.endings = {*ENDINGS, form.text.lower(), "json"}
        self.error: BadSample | None = None

    def __iter__(self) -> Iterator[dict[str, Any]]:
        try:
            yield from self._read()
        except BadSample as bad:
            self.error = bad
        except (tarfile.TarError, EOFError, OSError, ValueError, zlib.error) as error:
            self.error = BadSample("truncated shard", str(error))

    def _read(self) -> Iterator[dict[str, Any]]:
        # The stream asks a file object for nothing but read.
        with tarfile.open(  # type: ignore[call-overload]
            fileobj=self.shard, mode="r|*", tarinfo=_Header, bufsize=_READ
        ) as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # else it keeps every header of the shard
                plain = member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and not member.sparse
                ending = member.name.rpartition("/")[2].partition(".")[2].lower()
                if not plain or ending not in self.endings:
                    continue
                file = tar.extractfile(member) if member.size <= MAX_IMAGE_BYTES else None
                data = file.read() if file is not None else None  # None: too large
                yield {"fname": member.name, "data": data, "__url__": self.shard.url}


def read_shard(url: str, form: TextForm) -> Iterator[Item]:
    """The rows of a shard in order; what is wrong with the shard itself comes last.

    A sample has a row for each of its captions. One that the break made incomplete is left out.
    """
    with open_shard(url) as shard:
        members = _Members(shard, form)
        held: list[Item] = []
        number = 0
        for sample in _group(iter(members)):
            yield from held
            held = _rows(number, sample, form)
            number += len(held)
        if not (members.error and held and held[0].bad):
            yield from held
        if members.error is not None:
            yield Item(WHOLE_SHARD, url, None, members.error)


def _rows(number: int, sample: dict[str, Any], form: TextForm) -> list[Item]:
    key = str(sample["__key__"])
    try:
        records = _records(key, sample, form)
    except BadSample as bad:
        return [Item(number, key, None, bad)]
    return [Item(row, key, record) for row, record in enumerate(records, number)]


def _records(key: str, sample: dict[str, Any], form: TextForm) -> list[Row]:
    if re.search(OUTSIDE, key):
        raise BadSample("outside root", "its name leads out of the shard")
    for ending, data in sample.items():
        if data is None:
            raise BadSample("too large", f"its {ending}")
    text, fields = sample.get(form.text.lower()), sample.get("json")
    if text is None and fields is None:
        raise BadSample("no caption", f"it has no {form.text} and no json")
    texts = read_texts(text, fields, form)
    image = next((sample[ending] for ending in sample if ending in ENDINGS), None)
    if image is None and not texts[0].turns:
        raise BadSample("missing image", f"its {form.text} or json is there alone")
    return [
        Row(
            key,
            () if image is None else (image,),
            text.caption,
            text.image_id or key,
            text.caption_id or f"{key}#{number}",
            turns=text.turns,
            answers=text.answers,
            labels=text.labels,
            question_type=text.question_type,
            answer_type=text.answer_type,
        )
        for number, text in enumerate(texts)
    ]


def _group(members: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    # Nothing of webdataset that could open or unpickle is called; this locks it as well.
    os.environ.setdefault("WDS_SECURE", "1")
    from webdataset.tariterators import group_by_keys

    # A second member of the same name and extension is passed over: the first one counts.
    yield from group_by_keys(members, handler=lambda error: True)
