"""Tables of rows as one split of a dataset: one table, or one for each of its shards."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from engine.data.cache import cached_array
from engine.data.permutation import Indices
from engine.data.tables import lengths
from engine.data.tables.paths import ImageRoot
from engine.data.tables.table import PLACE, Block, Stored, Table, open_table, to_batches
from engine.data.tables.values import most_common
from engine.types import BadSample, EncodedImage, Place, Row, Source, Turn

_NUM_NAMED = 3  # damaged tables in a message


File = tuple[str, tuple[int, int]]
"""A file that images are inside of, and its size and time when they were noted."""


class Part(NamedTuple):
    """One of a source's tables, with the files that its images are inside of."""

    table: Table
    files: Sequence[File]
    shown: str = ""  # a shard's name in messages and ids


class Tables:
    """The tables of a source: one, its images in the files ``held_in``.

    Columns are kept beside ``path``, a file named by all that the rows were made of. ``rows`` and
    ``faults``, int64, are the number of each table's rows and of those known to be lost.
    """

    path: Path
    rows: np.ndarray
    faults: np.ndarray

    def __init__(self, table: Table, held_in: Sequence[Path] = ()) -> None:
        states = [path.stat() for path in held_in]
        files = [(str(p), (s.st_size, s.st_mtime_ns)) for p, s in zip(held_in, states, strict=True)]
        self._part = Part(table, files)
        self.path, self.rows = table.path, np.array([len(table)])
        self.faults = np.array([table.num_faults])

    def __getitem__(self, number: int) -> Part:
        return self._part


class TableSource(Source):
    """Rows of tables, one table after another.

    ``images`` is the folder of images that rows name; the others are inside the tables' files,
    ``base64`` says whether as such text. ``sharded``: there is a table for each of the dataset's
    shards, and ids that a row does not give are made from its place there.
    """

    def __init__(
        self,
        name: str,
        split: str,
        parts: Tables,
        images: ImageRoot | None = None,
        *,
        base64: bool = False,
        sharded: bool = False,
        classes: list[str] | None = None,
    ) -> None:
        self.name, self.split, self.parts, self.images = name, split, parts, images
        self.base64, self.sharded, self.classes = base64, sharded, classes
        self._ends = array("q", np.cumsum(parts.rows).tolist())
        self._length = self._ends[-1]

    def __len__(self) -> int:
        return self._length

    def _at(self, index: int) -> tuple[Part, Block, int]:
        if not 0 <= index < self._length:
            raise IndexError(f"row {index} of {self._length} in {self.name}")
        number = bisect_right(self._ends, index)
        part = self.parts[number]
        start = self._ends[number - 1] if number else 0
        return part, *part.table.at(index - start)

    def __getitem__(self, index: int) -> Row:
        """The row at ``index``; BadSample where it cannot be used, or its image is elsewhere."""
        part, block, place = self._at(index)
        (key, images, caption, image_id, caption_id, label, turns, answers, labels, question,
         cause, detail, *texts) = block.row(place)  # fmt: skip
        shown, own, made_id = _names(part.shown, key, images, index)
        if cause:
            raise BadSample(cause, f"{own}: {detail}" if part.shown else detail or "")
        caption = self._text(caption, images)
        if not caption or not caption.strip():
            raise BadSample("no answer" if turns else "no caption", f"row {index + 1}")
        given = tuple(filter(None, answers or ()))
        if question and not turns:
            turns = (("human", question), *((("gpt", most_common(given)),) if given else ()))
        return Row(
            shown,
            tuple([self._image(part, image, index, shown) for image in images or ()]),
            caption,
            made_id if image_id is None else image_id,
            str(index) if caption_id is None else caption_id,
            label,
            turns or (),
            given,
            tuple(filter(None, labels or ())),
            question,
            "",
            "",
            *[text or "" for text in texts],
        )

    def _text(self, caption: str | None, images: Sequence[Stored] | None) -> str | None:
        """The caption of a row whose table has this one."""
        return caption

    def _image(self, part: Part, image: Stored, index: int, shown: str) -> EncodedImage:
        path, file, offset, size = image
        if offset is not None:
            held_in, state = part.files[file or 0]
            return Place(held_in, offset, size, shown, self.base64, state)
        if not path:
            raise BadSample("missing", f"row {index + 1} names no image")
        if self.images is None:
            raise BadSample("missing", f"row {index + 1} names {path!r}; there is no image folder")
        return self.images.path(path)

    @property
    def blocks(self) -> np.ndarray | None:
        """int64 [shards]: rows of each shard; a block is read fastest as a whole."""
        return self.parts.rows if self.sharded else None

    @property
    def state(self) -> str:
        return self.parts.path.name

    @property
    def has_conversations(self) -> bool:
        """Whether any row has turns of its own."""
        return any(part.table.has_values("turns") for part in self._parts())

    def conversations(self) -> Iterator[tuple[Turn, ...]]:
        for part in self._parts():
            for batch in part.table.batches:
                read = Block(batch).read["turns"]
                yield from (read(row) or () for row in range(len(batch)))

    def captions(self) -> Iterator[str]:
        for part in self._parts():
            yield from (caption or "" for caption in part.table.values("caption"))

    def captions_of(self, rows: Indices) -> Iterator[str]:
        for row in rows.tolist():
            _, block, place = self._at(row)
            yield block.read["caption"](place) or ""

    def column(self, name: str) -> np.ndarray:
        """Memory-mapped: int64 codes of ``image_id`` or ``caption_id``, equal where the ids are;
        int64 ``label``, -1 for none; int32 lengths (engine/data/tables/lengths.py); int64
        ``pair_ends``: how many pairs the rows up to each one have, itself included."""
        length, kind = self._length, cast(type, np.int64)
        if name in lengths.COLUMNS:
            kind = np.int32
            length = int(self.column("pair_ends")[-1]) if name.startswith("pair") else length
        path = self.parts.path.with_name(f"{self.parts.path.name}.{name}.npy")
        return cached_array(path, kind, length, lambda: self._counted(name))

    def _counted(self, name: str) -> Iterator[np.ndarray]:
        if name in ("image_id", "caption_id"):
            yield from self._codes(name)
            return
        before = 0
        for _, _, batch in self._batches():
            if name == "pair_ends":
                ends = np.cumsum(lengths.num_pairs(batch)) + before
                before = int(ends[-1]) if len(ends) else before
                yield ends
            elif name in lengths.COLUMNS:
                yield lengths.COLUMNS[name](batch)
            elif "label" in batch.schema.names:
                yield batch.column("label").fill_null(-1).to_numpy()
            else:
                yield np.full(len(batch), -1)

    def _codes(self, name: str) -> Iterator[np.ndarray]:
        """Codes as the ids first appear; the distinct ids are in memory meanwhile."""
        if not any(part.table.has_values(name) for part in self._parts()):
            if name == "caption_id":
                yield np.arange(self._length)
                return
            if self.sharded:  # an image's rows are one after another
                new = [_new_images(batch) for _, _, batch in self._batches()]
                yield np.cumsum(np.concatenate(new)) - 1
                return
        ids = pa.chunked_array([_ids(name, *each) for each in self._batches()])
        for chunk in ids.dictionary_encode().chunks:
            yield chunk.indices.to_numpy()
        pa.default_memory_pool().release_unused()

    def _parts(self) -> Iterator[Part]:
        return (self.parts[number] for number in range(len(self._ends)))

    def _batches(self) -> Iterator[tuple[str, int, pa.RecordBatch]]:
        """Each record batch with its shard's name and the number of its first row."""
        start = 0
        for part in self._parts():
            for batch in part.table.batches:
                yield part.shown, start, batch
                start += len(batch)


def _names(
    shard: str, key: str | None, images: Sequence[Stored] | None, index: int
) -> tuple[str, str, str]:
    """A row's key, what names it in its faults, and the id of its image where none is given."""
    first = images[0] if images else None
    if not shard:
        path = first[0] if first else None
        return path or f"row {index + 1}", "", path or str(index)
    place = f"{shard}/{key}" if key else shard
    if first is None:
        return place, place, f"{shard}/{key or ''}@-1"
    own = place.rpartition(".")[0]
    return place, own, f"{own}@{first[2]}"


def _ids(name: str, shard: str, start: int, batch: pa.RecordBatch) -> pa.Array:
    """The ids of a batch's rows as the source hands them out, the first row's number ``start``."""
    kind = pa.large_string() if shard else pa.string()
    numbers = pa.array(np.arange(start, start + len(batch))).cast(kind)
    if name == "caption_id":
        made = numbers
    elif not shard:
        paths = _firsts(batch, "path")
        named = pc.if_else(pc.equal(paths, ""), pa.scalar(None, kind), paths)
        made = pc.coalesce(named, numbers) if named.null_count else named
    else:
        offsets = _firsts(batch, "offset").fill_null(-1)
        keys = _column(batch, "key", kind).fill_null("")
        bare = pc.replace_substring_regex(keys, r"\.[^./]*$", "")
        own = pc.if_else(pc.greater(offsets, 0), bare, keys)
        before, between, nothing = (pa.scalar(part, kind) for part in (f"{shard}/", "@", ""))
        made = pc.binary_join_element_wise(before, own, between, offsets.cast(kind), nothing)
    return pc.coalesce(_column(batch, name, kind), made)


def _column(batch: pa.RecordBatch, name: str, kind: pa.DataType) -> pa.Array:
    return batch.column(name) if name in batch.schema.names else pa.nulls(len(batch), kind)


def _firsts(batch: pa.RecordBatch, field: str) -> pa.Array:
    """A field of ``PLACE`` of each row's first image; null without one."""
    kind = PLACE.field(field).type
    if "images" not in batch.schema.names:
        return pa.nulls(len(batch), kind)
    images = batch.column("images")
    counts = pc.list_value_length(images).fill_null(0).to_numpy()
    places = pc.list_flatten(images)
    if places.type.get_field_index(field) < 0:
        return pa.nulls(len(batch), kind)
    values = places.field(field)
    if (counts == 1).all():
        return values
    return values.take(pa.array(np.cumsum(counts) - counts, mask=counts == 0))


def _new_images(batch: pa.RecordBatch) -> np.ndarray:
    """bool [rows]: where a row's image is not that of the row before."""
    offsets = _firsts(batch, "offset").fill_null(-1).to_numpy()
    return np.append(True, (offsets[1:] != offsets[:-1]) | (offsets[1:] < 0))


def damage_report(source: object) -> list[str]:
    """What is known to be lost before anything is read: a sentence for each damaged dataset that
    ``source`` shows or is a view of. Nothing is known of a stream."""
    if not isinstance(source, TableSource):
        below = source.below if isinstance(source, Source) else ()
        return [text for each in below for text in damage_report(each)]
    faults, rows = source.parts.faults, source.parts.rows
    damaged = np.flatnonzero(faults)
    if not len(damaged):
        return []
    named = []
    for number in damaged[:_NUM_NAMED].tolist():
        causes = pa.chunked_array(list(source.parts[number].table.column("cause")))
        first = pc.index(causes.is_valid(), True).as_py()
        try:
            source[int(rows[:number].sum()) + first]
        except BadSample as bad:
            named.append(str(bad))
    more = ", …" if len(damaged) > _NUM_NAMED else ""
    of = f" in {len(damaged)} of {len(faults)} shards" if source.sharded else ""
    return [
        f"{source.name}: {int(faults.sum())} of {len(source):,} samples are lost{of} "
        f"({'; '.join(named)}{more})"
    ]


def open_rows(
    name: str,
    split: str,
    inputs: Sequence[Path],
    options: object,
    rows: Callable[[], Iterable[Row]],
    *,
    cache_dir: Path,
    images: ImageRoot | None = None,
    held_in: Sequence[Path] = (),
    base64: bool = False,
) -> TableSource:
    """A split whose rows a format makes of ``inputs`` and ``options``, written once into a table.

    ``images`` is the folder of images that rows name by their paths; the others are inside the
    files ``held_in``. Raises UserError where no row can be used, and what ``rows`` raises.
    """

    table = open_table(inputs, options, lambda: to_batches(rows(), held_in), cache_dir=cache_dir)
    return TableSource(name, split, Tables(table, held_in), images, base64=base64)
