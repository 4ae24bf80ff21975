"""What ``--mode=generate`` is given, as a source: a folder of images, or a file of questions.

    questions.csv     image,question[,question_id][,answers]      answers joined by |
    questions.json    [{"question", "image" or "image_id", "question_id", "answers"}, …], or VQA's
                      {"questions": [{"question_id", "image_id", "question"}, …]}; also .json.gz
    questions.jsonl   one of these a line

An image is a file below the folder of images; one known by its image_id alone is the file whose
name ends with that number (``COCO_val2014_000000000042.jpg`` is 42), or is that id. A question
without either is asked without an image.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engine.data.image_files import SUFFIXES
from engine.data.tables.paths import ImageRoot
from engine.data.tables.values import answers as given_answers
from engine.errors import UserError
from engine.metrics.files import entries, identity, load, read_csv, string
from engine.types import BadSample, Row, Source

KEY = "generate.input"
_FORM = '{"question": …, "image" or "image_id": …, "question_id": …}'
_NUMBER = re.compile(r"(\d+)$")


class Inputs(Source):
    """Rows to generate something from; they have no texts of their own."""

    split = "input"
    origin: Path  # the folder or file that was given

    def __init__(self, origin: Path) -> None:
        self.origin, self.name = origin, origin.name
        self.rows: Sequence[Any] = ()
        self.closed: list[str] = []  # folders that may not be read

    def __len__(self) -> int:
        return len(self.rows)

    def column(self, name: str) -> np.ndarray:
        """int64 [rows]: every row is its own."""
        return np.arange(len(self))

    def captions(self) -> Iterator[str]:
        """One empty text a row."""
        return iter([""] * len(self))


class Folder(Inputs):
    """The images below a folder, by their sorted relative paths; no captions.

    Hidden files and folders are left out.
    """

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.rows = sorted(
            str(path.relative_to(root))
            for path in _files(root, self._note)
            if path.name.lower().endswith(SUFFIXES) and not path.name.startswith(".")
        )

    def _note(self, error: OSError) -> None:
        self.closed.append(f"{error.filename}: {error.strerror}")

    def __getitem__(self, index: int) -> Row:
        path = self.rows[index]
        return Row(path, (self.origin / path,), "", path, str(index))


def _files(root: Path, onerror: Callable[[OSError], None] | None = None) -> Iterator[Path]:
    """Files below a folder, but for hidden folders."""
    for folder, inner, files in os.walk(root, onerror=onerror):
        inner[:] = [name for name in inner if not name.startswith(".")]
        yield from (Path(folder) / name for name in files)


def open_folder(name: str | None) -> Folder:
    """The folder that ``generate.input`` names. Raises UserError."""
    if name is None:
        raise UserError("--mode=generate needs a folder of images: input=DIR", key=KEY)
    root = Path(name)
    if not root.is_dir():
        what = f"{root} is a file" if root.exists() else f"there is no folder {root}"
        raise UserError(f"{what}; input=DIR names a folder of images", key=KEY)
    source = Folder(root)
    if not len(source):
        why = "; ".join([f"known endings: {' '.join(SUFFIXES)}", *source.closed[:1]])
        raise UserError(f"{root} holds no images; {why}", key=KEY)
    return source


def open_questions(name: str | None, images: str | None) -> Questions:
    """The questions of the file that ``generate.input`` names. Raises UserError."""
    if name is None or not Path(name).is_file():
        what = "--mode=generate" if name is None else "there is no file " + name
        raise UserError(f"{what}: input=FILE names a CSV or JSON file of questions", key=KEY)
    return Questions(Path(name), Path(images) if images else None)


class Questions(Inputs):
    """The questions of a file, in its order; a bad one is a BadSample when it is asked for."""

    def __init__(self, path: Path, images: Path | None = None) -> None:
        """Raises UserError where the file is not of a known form, or an id is there twice."""
        super().__init__(path)
        self.root = ImageRoot(images or path.parent)
        if not self.root.folder.is_dir():
            raise UserError(f"there is no folder {self.root.folder}", key="generate.images")
        try:
            self.rows = _read(path)
            self.ids = [self._id(place, row) for place, row in enumerate(self.rows)]
        except UserError as error:
            raise UserError(str(error), key=KEY) from error
        twice, times = max(Counter(self.ids).items(), key=lambda each: each[1])
        if times > 1:
            raise UserError(f"{path} has question_id {twice} more than once", key=KEY)
        wanted = any("image" not in row and "image_id" in row for row in self.rows)
        self._files = _by_id(self.root.folder) if wanted else {}

    def _id(self, place: int, row: dict[str, Any]) -> str:
        where = f"{self.origin}: question {place + 1}"
        string(where, row, "question", _FORM)
        return identity(where, row, "question_id", _FORM) if "question_id" in row else str(place)

    def __getitem__(self, index: int) -> Row:
        """The row at ``index``; BadSample where its image cannot be told."""
        row, key = self.rows[index], f"question {self.ids[index]}"
        found = self._image(row)
        images = () if found is None else (found,)
        image_id = str(row.get("image_id") or row.get("image") or "")
        answers = tuple(answer for answer in given_answers(row.get("answers")) if answer)
        turns = (("human", row["question"]),)
        return Row(key, images, "", image_id, self.ids[index], None, turns, answers)

    def _image(self, row: dict[str, Any]) -> Path | None:
        name = row.get("image")
        if isinstance(name, str) and name:
            return self.root.path(name)
        if name not in (None, "", []):
            raise BadSample("malformed", f"the image is {name!r}, a file's name is wanted")
        if row.get("image_id") in (None, ""):
            return None
        own = str(row["image_id"])
        found = self._files.get(str(int(own)) if own.isdecimal() else own, [])
        if len(found) != 1:
            what = f"{len(found)} files in" if found else "no file in"
            verb = "are" if found else "is"
            raise BadSample("missing", f"image {own}: {what} {self.root.folder} {verb} called so")
        return found[0]


def _read(path: Path) -> list[dict[str, Any]]:
    if path.suffix not in (".csv", ".tsv"):
        loaded = load(path)
        if isinstance(loaded, dict) and "questions" in loaded:
            loaded = loaded["questions"]
        return entries(path, loaded, _FORM, "questions")
    columns, numbered = read_csv(path)
    if "question" not in columns:
        raise UserError(f"{path} has no column question; its columns are: {', '.join(columns)}")
    rows: list[dict[str, Any]] = [{**row} for _, row in numbered]
    for row in rows if "answers" in columns else ():
        row["answers"] = row["answers"].split("|")
    return entries(path, rows, "a line", "questions")


def _by_id(folder: Path) -> dict[str, list[Path]]:
    """Files below a folder by the number that their name ends with, or by their name."""
    found: dict[str, list[Path]] = {}
    for path in _files(folder):
        stem = path.name.partition(".")[0]
        number = _NUMBER.search(stem)
        for own in {stem, str(int(number[1])) if number else stem}:
            found.setdefault(own, []).append(path)
    return found
