"""Images with their captions in files beside them: ``a.jpg`` and ``a.txt``.

    <root>/train/…  valid/…    images and texts, in folders of any depth

Where ``<root>`` has no folder of the split's name, all of ``<root>`` is divided: of ``valid_share``
of the images, chosen by a hash of their names, the valid split is made, of the others the train
split. An image keeps its split when others come or go.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from engine.config.section import ProperFraction
from engine.data.image_files import SUFFIXES, images_in
from engine.data.permutation import Indices
from engine.data.tables.paths import FolderOptions, ImageRoot, SplitFolder
from engine.data.tables.source import Tables, TableSource
from engine.data.tables.table import Stored, Table, file_named, open_table, to_batches
from engine.types import BadSample, Row

_MAX_TEXT_BYTES = 16 << 20


class Config(FolderOptions):
    """Options of ``format: sidecar``."""

    text: str = "txt"  # the texts' ending
    valid_share: ProperFraction = 0.0  # of the images, where there are no split folders


class SidecarSource(TableSource):
    """Images of one split in the order of their names; a text is read when it is asked for."""

    def __init__(self, name: str, split: str, table: Table, folder: ImageRoot, ending: str) -> None:
        super().__init__(name, split, Tables(table), folder)
        self.folder, self.ending = folder, ending

    def _text(self, caption: str | None, images: Sequence[Stored] | None) -> str:
        """Raises BadSample where the text is missing, empty or not UTF-8, or is a link to another
        place."""
        image = (images and images[0][0]) or ""
        name = f"{os.path.splitext(image)[0]}.{self.ending}"  # noqa: PTH122 (a name, not a path)
        try:
            with self.folder.path(name).open("rb") as file:
                content = file.read(_MAX_TEXT_BYTES + 1)
            if len(content) > _MAX_TEXT_BYTES:
                raise BadSample("caption too long", f"{name} has more than {_MAX_TEXT_BYTES} bytes")
            text = content.decode("utf-8-sig").strip()
        except FileNotFoundError:
            raise BadSample("no caption", f"there is no {name} beside {image}") from None
        except OSError as error:
            raise BadSample("unreadable", f"{name}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise BadSample("not text", f"{name} is not UTF-8: byte {error.start}") from error
        if not text:
            raise BadSample("no caption", f"the text beside {image} is empty")
        return text

    def captions(self) -> Iterator[str]:
        return self.captions_of(np.arange(len(self)))

    def captions_of(self, rows: Indices) -> Iterator[str]:
        for row in rows.tolist():
            _, block, place = self._at(row)
            try:
                yield self._text(None, block.read["images"](place))
            except BadSample:
                yield ""

    def column(self, name: str) -> np.ndarray:
        """As a table's, but lengths of the texts by a pass over all of them."""
        if name in ("length", "answer_length"):
            return np.fromiter((len(caption) or 1 for caption in self.captions()), np.int32)
        return super().column(name)


def build(config: Config, *, name: str, split: str, cache_dir: Path) -> SidecarSource:
    """Open one split. Raises UserError, naming the path, for a missing folder or no images."""
    folder = SplitFolder(config, name, split)
    root, share = config.root / split, 0.0
    if not root.is_dir():
        root, share = config.root, config.valid_share
        if split == "valid" and not share:
            raise folder.error(
                f"has no folder {config.root / split}; name a share of the images as valid_share, "
                "say 0.1",
                "valid_share",
            )

    def rows() -> Iterator[Row]:
        found = False
        for image in _images(root):
            if _is_chosen(image, split, share):
                found = True
                yield Row(images=(file_named(image),))
        if not found:
            raise folder.error(
                f"has no images for the {split} split in {root} (valid_share {share}); "
                f"known endings: {' '.join(SUFFIXES)}",
                "root",
            )

    # A folder's time changes when a file comes or goes.
    inputs, options = [root, *_folders(root)], ("sidecar", split, share)
    table = open_table(inputs, options, lambda: to_batches(rows()), cache_dir=cache_dir)
    return SidecarSource(name, split, table, ImageRoot(root), config.text.removeprefix("."))


def _folders(folder: Path) -> list[Path]:
    """All folders inside ``folder`` that are not hidden, in order."""
    found: list[Path] = []
    for parent, folders, _ in os.walk(folder):
        folders[:] = sorted(each for each in folders if not each.startswith("."))
        found += [Path(parent, each) for each in folders]
    return found


def _images(folder: Path) -> Iterator[str]:
    for parent in [folder, *_folders(folder)]:
        inside = str(parent.relative_to(folder)).encode(errors="replace").decode()
        for name in images_in(parent):
            yield str(Path(inside, name))


def _is_chosen(image: str, split: str, share: float) -> bool:
    """By the name without its ending, so that ``a.jpg`` and ``a.png`` fall together."""
    stem = os.path.splitext(image)[0].encode(errors="surrogateescape")  # noqa: PTH122
    place = int.from_bytes(hashlib.blake2b(stem, digest_size=8).digest(), "big") / 2**64
    return (place < share) == (split == "valid")
