"""The two forms that samples are packed into, a shard at a time."""

from __future__ import annotations

import csv
import hashlib
import io
import os
import shutil
import tarfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from engine.data.pack import text as pack_text
from engine.data.pack.plan import Plan
from engine.types import Record

csv.field_size_limit(1 << 30)  # captions may be longer than the module expects
_MODE = 0o644
_READ = 1 << 20  # bytes at once


class Writer(Protocol):
    """Takes a shard's samples in order; gives it its name when it is left without an error."""

    def __enter__(self) -> Writer: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None: ...

    def add(self, image: bytes, ending: str, records: Sequence[Record]) -> None:
        """One image and its rows; without an image b"" and an empty ending."""
        ...


class TarWriter:
    """A tar shard of ``key.jpg``, ``key.json`` and ``key.txt``; the same samples give the same
    bytes."""

    def __init__(self, plan: Plan, shard: int) -> None:
        self.target = plan.content(shard)
        self._temporary = self.target.with_name(f".{self.target.name}.making")
        self._shard, self._digits, self._number = shard, len(str(plan.shard_size - 1)), 0

    def __enter__(self) -> TarWriter:
        self._file = self._temporary.open("wb")
        self._tar = tarfile.open(fileobj=self._file, mode="w", format=tarfile.USTAR_FORMAT)
        return self

    def add(self, image: bytes, ending: str, records: Sequence[Record]) -> None:
        """One sample: an image and rows that differ in their captions alone."""
        text, fields = pack_text.members(records)
        key = f"{self._shard:05d}{self._number:0{self._digits}d}"
        self._number += 1
        if ending:
            self._member(f"{key}.{ending}", image)
        self._member(f"{key}.json", fields.encode())
        self._member(f"{key}.txt", text.encode())

    def _member(self, name: str, content: bytes) -> None:
        info = tarfile.TarInfo(name)
        info.size, info.mode = len(content), _MODE
        self._tar.addfile(info, io.BytesIO(content))

    def __exit__(self, kind: Any, error: object, trace: TracebackType | None) -> None:
        with self._file:
            if kind is None:
                self._tar.close()
                self._file.flush()
                os.fsync(self._file.fileno())
        if kind is None:
            self._temporary.replace(self.target)


class CsvWriter:
    """A folder of images, and a part of the split's CSV; an image that several rows in succession
    show is written once."""

    def __init__(self, plan: Plan, shard: int) -> None:
        self.target, self._rows = plan.content(shard), plan.rows(shard)
        self._temporary = self.target.with_name(f".{self.target.name}.making")
        self._shard, self._digits, self._number = shard, len(str(plan.shard_size - 1)), 0

    def __enter__(self) -> CsvWriter:
        shutil.rmtree(self._temporary, ignore_errors=True)
        self._temporary.mkdir()
        self._making = self._rows.with_name(f".{self._rows.name}.making")
        self._file = self._making.open("w", newline="", encoding="utf8")
        self._csv = csv.writer(self._file, lineterminator="\n")
        return self

    def add(self, image: bytes, ending: str, records: Sequence[Record]) -> None:
        """One image and its rows, as ``as_csv_has_it`` leaves them."""
        name = f"{self._shard:05d}{self._number:0{self._digits}d}.{ending}"
        self._number += 1
        (self._temporary / name).write_bytes(image)
        rows = (pack_text.csv_row(f"{self.target.name}/{name}", record) for record in records)
        self._csv.writerows(rows)

    def __exit__(self, kind: Any, error: object, trace: TracebackType | None) -> None:
        self._file.close()
        if kind is None:
            shutil.rmtree(self.target, ignore_errors=True)  # of a finished part that was damaged
            self._temporary.rename(self.target)
            self._making.replace(self._rows)


WRITERS: dict[str, type[TarWriter] | type[CsvWriter]] = {"webdataset": TarWriter, "csv": CsvWriter}


def checksum(plan: Plan, shard: int) -> tuple[int, str] | None:
    """Bytes and SHA-256 of what a shard has on disk; None where it is not wholly there.

    Of a tar shard, those of the file; of a part of the CSV form, of its rows and then its images.
    """
    summed = hashlib.sha256()
    try:
        if plan.to == "webdataset":
            return _add_file(summed, plan.content(shard)), summed.hexdigest()
        size = _add_file(summed, plan.rows(shard))
        for name in _image_names(plan.rows(shard)):
            size += _add_file(summed, plan.folder / name)
    except OSError:
        return None
    return size, summed.hexdigest()


def _add_file(summed: Any, path: Path) -> int:
    size = 0
    with path.open("rb") as file:
        while data := file.read(_READ):
            summed.update(data)
            size += len(data)
    return size


def _image_names(rows: Path) -> list[str]:
    with rows.open(newline="", encoding="utf8") as file:
        return list(dict.fromkeys(row[0] for row in csv.reader(file) if row))


def join_parts(plan: Plan, columns: Sequence[str]) -> None:
    """The CSV of the whole split from its finished parts, with these columns."""
    places = [pack_text.COLUMNS.index(column) for column in columns]
    path = plan.dest / f"{plan.split}_anno.csv"
    temporary = path.with_name(f".{path.name}.making")
    with temporary.open("w", newline="", encoding="utf8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        for shard in plan.shards:
            with plan.rows(shard).open(newline="", encoding="utf8") as part:
                writer.writerows([row[place] for place in places] for row in csv.reader(part))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
