"""The two forms that samples are packed into, tar shards and the CSV folder form."""

import csv
import hashlib
import io
import json
import os
import shutil
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from engine.data.sources import Split
from engine.data.tables.values import most_common
from engine.types import Row, Turn

FOLDER = ".pack"  # in the packed folder: what it was packed from, and the CSV form's parts
COLUMNS = (
    "image", "image_id", "caption", "caption_id", "question", "answers", "labels", "question_type",
    "answer_type", "source",
)  # fmt: skip
_LIST_MARK = "|"
csv.field_size_limit(1 << 30)  # captions may be longer than the module expects

Add = Callable[[str, bytes, str, Sequence[Row]], None]
"""Takes a shard's samples in order: a key, an image, its ending, and the rows that show it. Without
an image b"" and an empty ending."""


class Form(ABC):
    """Where and how the samples of one split are written, a shard at a time."""

    name: str
    holds_text_alone = True  # rows without an image

    def __init__(self, dest: Path, split: Split, shard_size: int) -> None:
        self.dest, self.split, self.shard_size = dest, split, shard_size
        self.folder = dest / split  # of the shards or images
        self.parts = self.folder  # where the files are that mark a shard as finished

    def stats(self, shard: int) -> Path:
        """The file whose presence marks a shard as finished, named as img2dataset names it."""
        return self.parts / f"{shard:05d}_stats.json"

    @abstractmethod
    def content(self, shard: int) -> Path:
        """A shard, or of the CSV form the folder of its images."""

    @abstractmethod
    def writing(self, shard: int) -> AbstractContextManager[Add]:
        """Gives the shard its name when it is left without an error."""

    def together(self, first: Row, row: Row) -> bool:
        """Whether two rows of the same image are written with it once."""
        return True

    def keep(self, row: Row) -> Row:
        """What this form can hold of a row."""
        return row

    def columns(self, row: Row) -> Sequence[str]:
        """Those that a row has values in."""
        return ()

    def finish(self, columns: Sequence[str], shards: range) -> None:  # noqa: B027 (a default)
        """Called once all shards are written; ``columns`` are those that any row has values in."""

    def key(self, shard: int, number: int) -> str:
        """The name of a sample, by its number in the shard."""
        return f"{shard:05d}{number:0{len(str(self.shard_size - 1))}d}"

    def checksum(self, shard: int) -> tuple[int, str] | None:
        """Bytes and SHA-256 of what a shard has on disk; None where a part of it is missing."""
        total, size = hashlib.sha256(), 0
        try:
            for path in self._files(shard):
                with path.open("rb") as file:
                    hashlib.file_digest(file, lambda: total)
                    size += file.tell()
        except OSError:
            return None
        return size, total.hexdigest()

    @abstractmethod
    def _files(self, shard: int) -> Iterator[Path]: ...


class TarShards(Form):
    """Tar shards of ``key.jpg``, ``key.json`` and ``key.txt``; the same samples give the same
    bytes."""

    name = "webdataset"

    def content(self, shard: int) -> Path:
        return self.folder / f"{shard:05d}.tar"

    @contextmanager
    def writing(self, shard: int) -> Iterator[Add]:
        with (
            writing_whole(self.content(shard), "wb") as file,
            tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar,
        ):

            def add(key: str, image: bytes, ending: str, rows: Sequence[Row]) -> None:
                text, fields = _members(rows)
                for kind, content in ((ending, image), ("json", fields), ("txt", text)):
                    if kind:
                        info = tarfile.TarInfo(f"{key}.{kind}")
                        info.size = len(content)
                        tar.addfile(info, io.BytesIO(content))

            yield add

    def together(self, first: Row, row: Row) -> bool:
        """One sample with several captions, where the rows differ in these alone."""
        same = ("image_id", "label", "turns", "answers", "labels", "question_type", "answer_type")
        return bool(row.images) and all(getattr(first, n) == getattr(row, n) for n in same)

    def _files(self, shard: int) -> Iterator[Path]:
        yield self.content(shard)


class CsvFolder(Form):
    """Folders of images, and for each a part of the split's CSV; an image that several rows in
    succession show is written once."""

    name = "csv"
    holds_text_alone = False

    def __init__(self, dest: Path, split: Split, shard_size: int) -> None:
        super().__init__(dest, split, shard_size)
        self.parts = dest / FOLDER / split

    def content(self, shard: int) -> Path:
        return self.folder / f"{shard:05d}"

    def rows(self, shard: int) -> Path:
        """The rows of a part, with all of ``COLUMNS``, without their names."""
        return self.parts / f"{shard:05d}.csv"

    @contextmanager
    def writing(self, shard: int) -> Iterator[Add]:
        target = self.content(shard)
        temporary = target.with_name(f".{target.name}.making")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        with writing_whole(self.rows(shard), "w", encoding="utf8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")

            def add(key: str, image: bytes, ending: str, rows: Sequence[Row]) -> None:
                name = f"{key}.{ending}"
                (temporary / name).write_bytes(image)
                writer.writerows(_csv_row(f"{target.name}/{name}", row) for row in rows)

            yield add
            shutil.rmtree(target, ignore_errors=True)  # of a finished part that was damaged
            temporary.rename(target)

    def keep(self, row: Row) -> Row:
        """The row without what a CSV has no place for: a conversation of other turns than one
        question and its most common answer, names with the mark that joins lists, a class's
        number."""
        answers, turns = row.answers, row.turns
        asked = _question(turns)
        answered = (("human", asked), ("gpt", most_common(answers)))
        usual = (answered if answers else answered[:1]) if asked else ()
        if turns != usual or any(_LIST_MARK in answer for answer in answers):
            answers, turns = (), ()
        labels = tuple(label for label in row.labels if _LIST_MARK not in label)
        return replace(row, turns=turns, answers=answers, labels=labels, label=None)

    def columns(self, row: Row) -> Sequence[str]:
        values = zip(COLUMNS, _csv_row("image", row), strict=True)
        return [n for n, v in values if v or n in ("image_id", "caption", "caption_id")]

    def finish(self, columns: Sequence[str], shards: range) -> None:
        """Join the parts into the CSV of the whole split."""
        places = [COLUMNS.index(column) for column in columns]
        path = self.dest / f"{self.split}_anno.csv"
        with writing_whole(path, "w", encoding="utf8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(columns)
            for shard in shards:
                writer.writerows([row[place] for place in places] for row in self._read(shard))

    def _read(self, shard: int) -> Iterator[list[str]]:
        with self.rows(shard).open(newline="", encoding="utf8") as part:
            yield from csv.reader(part)

    def _files(self, shard: int) -> Iterator[Path]:
        yield self.rows(shard)
        for name in dict.fromkeys(row[0] for row in self._read(shard) if row):
            yield self.folder / name


FORMS: dict[str, type[Form]] = {form.name: form for form in (TarShards, CsvFolder)}


def _members(rows: Sequence[Row]) -> tuple[bytes, bytes]:
    """The text and the JSON of a tar sample, whose rows differ in their captions alone.

    The text holds all captions, a line each; the JSON all that a row holds, so that nothing is
    lost. ``source`` is the name that the sample had.
    """
    first, text = rows[0], rows[0].caption
    fields: dict[str, Any] = {"source": first.key, "image_id": first.image_id}
    if len(rows) == 1:
        fields |= {"caption_id": first.caption_id, "caption": first.caption}
    else:
        fields["caption_ids"] = [row.caption_id for row in rows]
        fields["captions"] = [row.caption for row in rows]
        text = "\n".join(" ".join(row.caption.splitlines()) for row in rows)
    if first.turns:
        fields["conversations"] = [{"from": who, "value": said} for who, said in first.turns]
    if first.answers:
        fields |= {"question": _question(first.turns), "answers": first.answers}
    more = {
        "question_type": first.question_type or None,
        "answer_type": first.answer_type or None,
        "labels": first.labels or None,
        "label": first.label,
    }
    fields |= {name: value for name, value in more.items() if value is not None}
    return text.encode(), json.dumps(fields, ensure_ascii=False).encode()


def _csv_row(image: str, row: Row) -> tuple[str, ...]:
    """Values of ``COLUMNS`` of what ``CsvFolder.keep`` returned."""
    answers, labels = _LIST_MARK.join(row.answers), _LIST_MARK.join(row.labels)
    texts = row.image_id, row.caption, row.caption_id, _question(row.turns), answers, labels
    return image, *texts, row.question_type, row.answer_type, row.key


def _question(turns: Sequence[Turn]) -> str:
    return next((text for who, text in turns if who == "human"), "")


@contextmanager
def writing_whole(path: Path, mode: str, **options: Any) -> Iterator[IO[Any]]:
    """A file that gets its name, and is on disk, when it is left without an error."""
    temporary = path.with_name(f".{path.name}.making")
    with temporary.open(mode, **options) as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
