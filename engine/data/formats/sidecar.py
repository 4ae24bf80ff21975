"""Images with their captions in files beside them: ``a.jpg`` and ``a.txt``.

    <root>/train/…  valid/…    images and texts, in folders of any depth

Where ``<root>`` has no folder of the split's name, all of ``<root>`` is divided: of ``valid_share``
of the images, chosen by a hash of their names, the valid split is made, of the others the train
split. An image keeps its split when others come or go.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from engine.config.schema import Section
from engine.config.section import ProperFraction
from engine.data.image_files import SUFFIXES
from engine.data.tables.image_root import ImageRoot
from engine.data.tables.places import check_root
from engine.data.tables.table import Table, open_table
from engine.errors import UserError
from engine.types import BadSample, Row, Source

FORM = 1  # of the cached table; raised when its content changes
_ROWS = 65_536  # written at once
_MAX_TEXT_BYTES = 16 << 20
_SCHEMA = pa.schema([("image", pa.string())])


class Config(Section):
    """Options of ``format: sidecar``."""

    root: Path  # relative to data.data_path; default: the dataset's name
    text: str = "txt"  # the texts' ending
    valid_share: ProperFraction = 0.0  # of the images, where there are no split folders


class SidecarSource(Source):
    """Images of one split in the order of their names; a text is read when it is asked for."""

    def __init__(self, name: str, split: str, table: Table, folder: Path, text: str) -> None:
        self.name = name
        self.split = split
        self.table = table
        self.images = ImageRoot(folder)
        self.text = text

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> Row:
        """The row at ``index``; BadSample where its text is missing, empty or no UTF-8, and where
        either file is a link to another place."""
        image = self.table.row(index)["image"]
        path = self.images.path(image)
        caption = self._caption(image)
        if not caption:
            raise BadSample("no caption", f"the text beside {image} is empty")
        return Row(image, (path,), caption, image, str(index))

    def _caption(self, image: str) -> str:
        name = f"{os.path.splitext(image)[0]}.{self.text}"  # noqa: PTH122 (a name, not a path)
        try:
            with self.images.path(name).open("rb") as file:
                content = file.read(_MAX_TEXT_BYTES + 1)
            if len(content) > _MAX_TEXT_BYTES:
                raise BadSample("caption too long", f"{name} has more than {_MAX_TEXT_BYTES} bytes")
            return content.decode("utf-8-sig").strip()
        except FileNotFoundError:
            raise BadSample("no caption", f"there is no {name} beside {image}") from None
        except OSError as error:
            raise BadSample("unreadable", f"{name}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise BadSample("not text", f"{name} is not UTF-8: byte {error.start}") from error

    def column(self, name: str) -> np.ndarray:
        """int64 codes of ``image_id`` or ``caption_id``: each row has its own; memory-mapped. Or
        int32 ``length`` or ``answer_length`` of the texts, by a pass over all of them."""
        if name in ("length", "answer_length"):
            return np.fromiter((len(caption) or 1 for caption in self.captions()), np.int32)
        return self.table.codes("image")

    def captions(self) -> Iterator[str]:
        """All captions in order; empty where a row has none."""
        for image in self.table.values("image"):
            try:
                yield self._caption(image)
            except BadSample:
                yield ""


def build(config: Config, *, name: str, split: str, cache_dir: Path) -> SidecarSource:
    """Open one split. Raises UserError, naming the path, for a missing folder or no images."""
    check_root(config.root, dataset=name)
    folder, share = config.root / split, 0.0
    if not folder.is_dir():
        folder, share = config.root, config.valid_share
        if split == "valid" and not share:
            raise UserError(
                f"dataset {name!r} has no folder {config.root / split}; name a share of the images "
                "as valid_share, say 0.1",
                key=f"data.datasets.{name}.valid_share",
            )
    names = _names(folder)
    folders = [folder, *names]
    chosen = (split, share)

    def write(temporary: Path) -> None:
        _write(folder, chosen, temporary)

    # A folder's time changes when a file comes or goes.
    table = open_table(folders, ("sidecar", FORM, chosen), write, cache_dir=cache_dir)
    if not len(table):
        raise UserError(
            f"dataset {name!r}: no images for the {split} split in {folder} (valid_share {share}); "
            f"known endings: {' '.join(SUFFIXES)}",
            key=f"data.datasets.{name}.root",
        )
    return SidecarSource(name, split, table, folder, config.text.removeprefix("."))


def _names(folder: Path) -> list[Path]:
    """All folders inside ``folder`` that are not hidden, in order."""
    found: list[Path] = []
    for parent, folders, _ in os.walk(folder):
        folders[:] = sorted(each for each in folders if not each.startswith("."))
        found += [Path(parent, each) for each in folders]
    return found


def _write(folder: Path, chosen: tuple[str, float], target: Path) -> None:
    """Stream the names of a split's images into an Arrow file."""
    with pa.OSFile(str(target), "wb") as file, pa.ipc.new_file(file, _SCHEMA) as writer:
        batch: list[str] = []
        for name in _images(folder):
            if _is_chosen(name, *chosen):
                batch.append(name)
            if len(batch) == _ROWS:
                writer.write_batch(pa.record_batch([pa.array(batch)], schema=_SCHEMA))
                batch = []
        writer.write_batch(pa.record_batch([pa.array(batch, pa.string())], schema=_SCHEMA))


def _images(folder: Path) -> Iterator[str]:
    for parent in [folder, *_names(folder)]:
        with os.scandir(parent) as entries:
            names = sorted(entry.name for entry in entries if entry.name[:1] != ".")
        inside = parent.relative_to(folder)
        for name in names:
            if name.lower().endswith(SUFFIXES):
                # Of bytes that are no UTF-8 a name is made that no file has: a bad sample.
                yield str(inside / name).encode(errors="replace").decode()


def _is_chosen(image: str, split: str, share: float) -> bool:
    """By the name without its ending, so that ``a.jpg`` and ``a.png`` fall together."""
    stem = os.path.splitext(image)[0].encode(errors="surrogateescape")  # noqa: PTH122
    place = int.from_bytes(hashlib.blake2b(stem, digest_size=8).digest(), "big") / 2**64
    return (place < share) == (split == "valid")
