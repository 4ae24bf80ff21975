"""What is packed into which shard, and where it is put: settled before anything is written."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.data.views.groups import Groups, group_rows
from engine.data.views.images import JoinedCaptions, OneCaption
from engine.errors import UserError
from engine.types import Source

FORM = 2  # of what is written; raised when the same samples would be written otherwise
FOLDER = ".pack"  # in the packed folder: what it was packed from, and the CSV form's parts
CAPTIONS = ("all", "joined", "first")
FORMS = ("webdataset", "csv")


@dataclass(frozen=True)
class Plan:
    """A split's samples in the order in which they are packed, cut into shards.

    ``groups`` are the rows of each image, which stay in one shard; None where each row is an image
    of its own.
    """

    source: Source
    groups: Groups | None
    to: str
    dest: Path
    split: str
    shard_size: int  # images

    @property
    def num_images(self) -> int:
        return len(self.source if self.groups is None else self.groups)

    @property
    def num_rows(self) -> int:
        return len(self.source)

    @property
    def shards(self) -> range:
        return range(-(-self.num_images // self.shard_size))

    def units(self, shard: int) -> Iterator[list[int]]:
        """The rows of each image of a shard."""
        first = shard * self.shard_size
        for image in range(first, min(first + self.shard_size, self.num_images)):
            yield [image] if self.groups is None else self.groups[image].tolist()

    @property
    def folder(self) -> Path:
        """Where the split's shards or images lie."""
        return self.dest / self.split

    @property
    def parts(self) -> Path:
        """Where the files lie that say that a shard is finished."""
        return self.folder if self.to == "webdataset" else self.dest / FOLDER / self.split

    def content(self, shard: int) -> Path:
        """A shard, or of the CSV form the folder of its images."""
        return self.folder / (f"{shard:05d}.tar" if self.to == "webdataset" else f"{shard:05d}")

    def rows(self, shard: int) -> Path:
        """The rows of a part of the CSV form."""
        return self.parts / f"{shard:05d}.csv"

    def stats(self, shard: int) -> Path:
        """The file whose presence says that a shard is finished, named as img2dataset has it."""
        return self.parts / f"{shard:05d}_stats.json"


def make_plan(
    source: Source,
    scratch: Path,
    *,
    captions: str,
    to: str,
    dest: Path,
    split: str,
    shard_size: int,
) -> Plan:
    """The rows of an image side by side, images in the order of their first rows; which rows those
    are is kept in the folder ``scratch`` while the plan is in use."""
    groups = group_rows(source, scratch)
    if captions == "joined":
        joined = JoinedCaptions(source, groups, " ")
        return Plan(joined, None, to, dest, split, shard_size)
    if captions == "first":
        return Plan(OneCaption(source, groups), None, to, dest, split, shard_size)
    return Plan(source, groups, to, dest, split, shard_size)


def origin(plan: Plan, options: dict[str, Any], captions: str) -> dict[str, Any]:
    """All that the content of the shards hangs on, as JSON.

    An annotation file's table is named by the file's size and time.
    """
    source: Any = plan.source
    while hasattr(source, "source"):  # of a view: what it is a view of
        source = source.source
    table = getattr(source, "table", None)
    stated: dict[str, Any] = {
        "form": FORM,
        "to": plan.to,
        "split": plan.split,
        "dataset": options,
        "rows": plan.num_rows,
        "images": plan.num_images,
        "captions": captions,
        "shard_size": plan.shard_size,
        "state": table.path.name if table is not None else None,
        "grouping": plan.groups.path.name.rpartition(".groups.")[2] if plan.groups else None,
    }
    return json.loads(json.dumps(stated, default=str))


@contextmanager
def held(plan: Plan, stated: dict[str, Any]) -> Iterator[None]:
    """The destination, kept from other packers. Raises UserError where it holds anything else than
    a part of the same."""
    _refuse_foreign(plan, stated)
    try:
        plan.folder.mkdir(parents=True, exist_ok=True)
        plan.parts.mkdir(parents=True, exist_ok=True)
        (plan.dest / FOLDER).mkdir(exist_ok=True)
        with (plan.dest / FOLDER / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"another process is packing into {plan.dest}") from None
            write_whole(_manifest(plan), json.dumps(stated, indent=1, ensure_ascii=False))
            yield
    except OSError as error:
        raise UserError(f"cannot pack into {plan.dest}: {error}") from error


def _manifest(plan: Plan) -> Path:
    return plan.dest / FOLDER / f"{plan.split}.json"


def _refuse_foreign(plan: Plan, stated: dict[str, Any]) -> None:
    dest = plan.dest
    if dest.exists() and not dest.is_dir():
        raise UserError(f"{dest} is a file; name a new folder to pack into")
    if not dest.exists() or not any(dest.iterdir()):
        return
    if not (dest / FOLDER).is_dir():
        there = ", ".join(sorted(path.name for path in dest.iterdir())[:5])
        raise UserError(
            f"{dest} holds something else ({there}); name a new or an empty folder to pack into"
        )
    for path in sorted((dest / FOLDER).glob("*.json")):
        try:
            before = json.loads(path.read_bytes())
            if before["to"] != plan.to:
                raise UserError(f"{dest} was packed to {before['to']}; name another folder")
            if path.name != _manifest(plan).name:
                continue
            differing = [name for name in stated if before.get(name) != stated[name]]
        except (ValueError, LookupError, TypeError):
            raise UserError(f"{path} is damaged; remove {dest} and pack again") from None
        if differing:
            told = "; ".join(
                f"{name} {before.get(name)!r}, now {stated[name]!r}" for name in differing
            )
            raise UserError(
                f"{dest} was packed from something else or otherwise ({told[:400]}); name another "
                f"folder, or remove it to pack again"
            )


def write_whole(path: Path, text: str) -> None:
    """A file that is there wholly or not at all."""
    temporary = path.with_name(f".{path.name}.making")
    temporary.write_text(text, encoding="utf8", errors="backslashreplace")
    temporary.replace(path)
