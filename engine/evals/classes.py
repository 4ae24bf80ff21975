"""Classes by name: files of names and prompt templates, and rows that name their class.

Class folders number their classes themselves. Elsewhere a row's ``labels`` are names, which get
their numbers here: from a file of classes for zero-shot classification, for a probe by sorting.

Files come in the forms in which they are published.

Classes: a JSON list of names; a JSON object folder → name, or number → name (or → [folder, name]);
a text file with a name a line. In a list, a class may be a list of names for the same. Templates:
a JSON list or text lines, each with ``{}`` or ``{c}``. Both at once: ``{"classes": […],
"templates": […]}``, or an object of several such sets by name, of which ``file.json#SET`` takes one
(default: the set called like the dataset).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from engine.data.bad_samples import summary
from engine.data.views import View
from engine.dist import collectives
from engine.errors import UserError
from engine.evals.predict import Encoded, share
from engine.metrics import files
from engine.registry import nearest
from engine.types import BadSample, Row, Source

DEFAULT_TEMPLATE = "a photo of a {}."
_HOLES = ("{}", "{c}")


@dataclass(frozen=True)
class Prompts:
    """Class names in the order of labels, the templates, and the folders of classes if known.

    A class may have several names: its prompts are all of them in all templates.
    """

    classes: tuple[tuple[str, ...], ...]
    templates: tuple[str, ...]
    folders: tuple[str, ...] | None = None
    origin: str = ""  # the file, for messages

    def texts(self, label: int) -> list[str]:
        """The prompts of one class."""
        return [
            template.replace(_HOLES[0], name).replace(_HOLES[1], name)
            for name in self.classes[label]
            for template in self.templates
        ]

    def numbers(self) -> dict[str, int]:
        """Every name of each class, and its folder where known → its label; the same of plain."""
        found = {name: label for label, names in enumerate(self.classes) for name in names}
        found |= {folder: label for label, folder in enumerate(self.folders or ())}
        return {plain(name): label for name, label in found.items()} | found

    def in_order_of(self, folders: list[str] | None, dataset: str) -> Prompts:
        """The same with classes in the order of a dataset's labels (its class folders).

        Names are matched to folders where the file states folders, where names and folders are the
        same words, or where folders are numbers; else by position. Only classes that the dataset
        has are kept. Raises UserError where neither fits.
        """
        if folders is None:
            return self
        keys = self.folders or tuple(names[0] for names in self.classes)
        place = {plain(key): position for position, key in enumerate(keys)}
        wanted = [plain(folder) for folder in folders]
        if not set(wanted) <= place.keys() and all(folder.isdecimal() for folder in folders):
            wanted = [str(int(folder)) for folder in folders]  # sorted as text: 0, 1, 10, 2
            place = {str(number): number for number in range(len(self.classes))}
        if set(wanted) <= place.keys():
            order = [place[folder] for folder in wanted]
            return replace(self, classes=tuple(self.classes[i] for i in order), folders=None)
        if self.folders is not None:
            missing = next(
                f for f, plain in zip(folders, wanted, strict=True) if plain not in place
            )
            raise UserError(
                f"dataset {dataset!r} has a class folder {missing!r} that {self.origin} does not "
                f"name; {nearest(missing, list(self.folders)[:50])}"
            )
        if len(folders) != len(self.classes):
            raise UserError(
                f"{self.origin} has {len(self.classes)} classes, dataset {dataset!r} has "
                f"{len(folders)} class folders ({', '.join(folders[:5])}, …)"
            )
        return self


def load(
    classes: str | Path, templates: str | Path | None = None, *, dataset: str = "", key: str = ""
) -> Prompts:
    """Read a file of classes and one of templates. Raises UserError naming file and remedy.

    Without a file of templates, those beside the classes are taken, else "a photo of a {}.".
    ``key`` is the dotted path of the section that names the files.
    """
    at = f"{key}.classes" if key else None
    origin, value = _read(classes, dataset, "classes", at)
    chosen, template_origin = None, origin
    if isinstance(value, dict) and isinstance(value.get("classes"), list | dict):
        value, chosen = value["classes"], value.get("templates")
    folders, names = _classes(value, origin, at)
    if templates is not None:
        at = f"{key}.templates" if key else None
        template_origin, chosen = _read(templates, dataset, "templates", at)
        if isinstance(chosen, dict):
            chosen = chosen.get("templates")
    chosen = [DEFAULT_TEMPLATE] if chosen is None else chosen
    if not isinstance(chosen, list) or not chosen:
        raise UserError(f"{template_origin} holds no list of templates", key=at)
    for template in chosen:
        if not isinstance(template, str) or not any(hole in template for hole in _HOLES):
            raise UserError(
                f"template {template!r} in {template_origin} has no {{}} where the class name goes",
                key=at,
            )
    return Prompts(names, tuple(chosen), folders, origin)


def _read(path: str | Path, dataset: str, what: str, key: str | None) -> tuple[str, Any]:
    """(name for messages, value): JSON, or the lines of any other file; a set of several chosen."""
    name, _, chosen = str(path).partition("#")
    try:
        if not name.endswith(".json"):
            lines = map(str.strip, files.text(Path(name)).splitlines())
            return name, [line for line in lines if line]
        value = files.load(Path(name))
    except UserError as error:
        raise UserError(f"cannot read the file of {what}: {error}", key=key) from error
    if not (isinstance(value, dict) and value and all(isinstance(v, dict) for v in value.values())):
        if chosen:
            raise UserError(f"{name} holds one set, so {chosen!r} cannot be chosen", key=key)
        return name, value
    wanted = chosen or dataset
    found = next((own for own in value if plain(own) == plain(wanted)), None)
    if found is None:
        raise UserError(
            f"{name} holds several sets and none is called {wanted!r}; "
            f"{nearest(wanted, list(value))} Name one as {name}#SET",
            key=key,
        )
    return f"{name}#{found}", value[found]


def _classes(
    value: Any, origin: str, key: str | None
) -> tuple[tuple[str, ...] | None, tuple[tuple[str, ...], ...]]:
    """(folders or None, names of each class) from a list, or an object by folder or number."""
    folders: tuple[str, ...] | None = None
    if isinstance(value, dict) and value and all(str(label).isdecimal() for label in value):
        value = [value[label] for label in sorted(value, key=int)]
        if all(isinstance(entry, list) and len(entry) == 2 for entry in value):
            folders = tuple(str(folder) for folder, _ in value)
            value = [name for _, name in value]
    elif isinstance(value, dict):
        folders, value = tuple(value), list(value.values())
    if not isinstance(value, list):
        value = [None]
    classes = tuple(tuple(names) if isinstance(names, list) else (names,) for names in value)
    if not classes:
        raise UserError(f"{origin} names no class", key=key)
    for names in classes:
        if not names or not all(isinstance(name, str) and name for name in names):
            raise UserError(
                f"{origin} must hold class names: a list, or an object folder → name", key=key
            )
    return folders, classes


class NamedLabels(View):
    """``source`` with the number of its class's name as each row's label.

    ``numbers`` holds names, and may hold ``plain`` ones for those that are written otherwise;
    ``origin`` is where they come from, for messages. A row that has a label keeps it, one that
    names no class stays without. Raises UserError for a row of several names, or of an unknown one.
    """

    def __init__(self, source: Source, numbers: Mapping[str, int], origin: str) -> None:
        super().__init__([source], len(source))
        self.numbers, self.origin = numbers, origin

    def __getitem__(self, index: int) -> Row:
        record = self.source[index]
        if record.label is not None or not record.labels:
            return record
        row, name = f"row {index} of dataset {self.name!r}", record.labels[0]
        if len(record.labels) > 1:
            raise UserError(
                f"{row} names several classes ({', '.join(record.labels)}); classification needs "
                "one class an image"
            )
        number = self.numbers.get(name, self.numbers.get(plain(name)))
        if number is None:
            raise UserError(
                f"{row} is of class {name!r}, which {self.origin} does not name; "
                f"{nearest(name, list(self.numbers)[:1000])}"
            )
        return replace(record, label=number)

    def column(self, name: str) -> np.ndarray:
        return self.source.column(name)


def plain(name: str) -> str:
    """Folders and names differ in case, underscores and blanks."""
    return "".join(character for character in name.lower() if character.isalnum())


def check_labels(
    source: Source, images: Encoded, num_classes: int | None = None, key: str | None = None
) -> None:
    """Raises UserError for no image, and for the first that has no label or one of no class."""
    if not len(images.rows):
        raise UserError(
            f"dataset {source.name!r} ({source.split}) has no image that can be used: "
            f"{summary(images.bad) if images.bad else 'it has no rows'}",
            key=key,
        )
    wrong = images.labels < 0
    if num_classes is not None:
        wrong |= images.labels >= num_classes
    if wrong.any():
        first = int(wrong.nonzero()[0])
        label = int(images.labels[first])
        what = "no label" if label < 0 else f"label {label}, but there are {num_classes} classes"
        raise UserError(
            f"row {int(images.rows[first])} of dataset {source.name!r} has {what}; classification "
            "needs labelled images (format: imagefolder, or a CSV with a column labels)",
            key=key,
        )


def class_names(*sources: Source) -> list[str]:
    """Sorted names of the classes that rows of the sources name; each rank reads a share."""
    found: set[str] = set()
    for source in sources:
        for row in share(range(len(source))):
            try:
                found.update(source[row].labels)
            except BadSample:
                continue
    return sorted({name for names in collectives.all_gather_json(sorted(found)) for name in names})
