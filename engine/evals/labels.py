"""Labels by name: sources whose rows name the class of their image, as a CSV column does.

Class folders number their classes themselves. Elsewhere a row's ``labels`` are names, which get
their numbers here: from a file of classes for zero-shot classification, for a probe by sorting.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from engine.data.share import rank_slice
from engine.dist import collectives
from engine.errors import UserError
from engine.registry import nearest
from engine.types import BadSample, Row, Source


class NamedLabels(Source):
    """``source`` with the number of its class's name as each row's label.

    ``numbers`` holds names, and may hold ``plain`` ones for those that are written otherwise;
    ``origin`` is where they come from, for messages. A row that has a label keeps it, one that
    names no class stays without. Raises UserError for a row of several names, or of an unknown one.
    """

    def __init__(self, source: Source, numbers: Mapping[str, int], origin: str) -> None:
        self.source, self.numbers, self.origin = source, numbers, origin
        self.name, self.split = source.name, source.split

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Row:
        record = self.source[index]
        if record.label is not None or not record.labels:
            return record
        row = f"row {index} of dataset {self.name!r}"
        if len(record.labels) > 1:
            raise UserError(
                f"{row} names several classes ({', '.join(record.labels)}); classification needs "
                "one class an image"
            )
        name = record.labels[0]
        number = self.numbers.get(name, self.numbers.get(plain(name)))
        if number is None:
            raise UserError(
                f"{row} is of class {name!r}, which {self.origin} does not name; "
                f"{nearest(name, list(self.numbers)[:1000])}"
            )
        return replace(record, label=number)

    def column(self, name: str) -> np.ndarray:
        return self.source.column(name)

    def captions(self) -> Iterator[str]:
        return self.source.captions()

    @property
    def below(self) -> Sequence[Source]:
        return (self.source,)


def plain(name: str) -> str:
    """Folders and names differ in case, underscores and blanks."""
    return "".join(character for character in name.lower() if character.isalnum())


def class_names(*sources: Source) -> list[str]:
    """Sorted names of the classes that rows of the sources name; each rank reads a share."""
    found: set[str] = set()
    for source in sources:
        for row in rank_slice(range(len(source)), collectives.rank(), collectives.world()):
            try:
                found.update(source[row].labels)
            except BadSample:
                continue
    return sorted({name for names in collectives.all_gather_json(sorted(found)) for name in names})
