"""Reading JSON and CSV files that users hand in, each mistake reported with its file and place."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from engine.errors import UserError

csv.field_size_limit(1 << 30)  # texts may be longer than the module expects

Entry = dict[str, Any]
_KINDS = {
    bool: "true or false", int: "a number", float: "a number", str: "a text", list: "a list",
    dict: "an object", type(None): "null",
}  # fmt: skip


def load(path: Path) -> Any:
    """What a JSON file holds, unpacked where gzip has packed it. Raises UserError.

    A file named ``.jsonl`` holds a list, an entry a line.
    """
    content = text(path)
    if ".jsonl" not in path.suffixes:
        return _parse(str(path), content)
    lines = enumerate(content.split("\n"), 1)
    return [_parse(f"{path}: line {number}", line) for number, line in lines if line.strip()]


def read_csv(path: Path) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    """The columns of a CSV, or of a TSV by its ending, and its rows with each one's last line.

    Raises UserError for a file that cannot be read, has no header, or whose rows have other
    numbers of values than it has columns.
    """
    content = io.StringIO(text(path), newline="")
    delimiter = "\t" if path.suffix == ".tsv" else ","
    reader = csv.DictReader(content, delimiter=delimiter, strict=True)
    rows: list[tuple[int, dict[str, str]]] = []
    try:
        columns = list(reader.fieldnames or [])
        for row in reader:
            if None in row or None in row.values():
                many = "more" if None in row else "fewer"
                raise UserError(f"{path}, line {reader.line_num}: {many} values than columns")
            rows.append((reader.line_num, row))
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num + 1}: {error}") from error
    if not columns:
        raise UserError(f"{path} is empty; its first line must name its columns")
    return columns, rows


def text(path: Path) -> str:
    """A file's text, unpacked where gzip has packed it. Raises UserError."""
    try:
        packed = path.read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    try:
        content = gzip.decompress(packed) if packed[:2] == b"\x1f\x8b" else packed
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not text in UTF-8: {error}") from error
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be unpacked: {error}") from error


def _parse(where: str, content: str) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON in UTF-8: {error}") from error


def entries(path: Path, loaded: Any, form: str, what: str = "entries") -> list[Entry]:
    """A list of objects, at least one; ``form`` shows one in messages. Raises UserError."""
    if not isinstance(loaded, list):
        raise UserError(f"{path} holds {kind(loaded)}; a list of {form} is wanted")
    if not loaded:
        raise UserError(f"{path} holds no {what}")
    for place, entry in enumerate(loaded):
        if not isinstance(entry, dict):
            raise UserError(f"{path}: entry {place} is {kind(entry)}, an object is wanted")
    return loaded


def section(path: Path, name: str, form: str, what: str) -> list[Entry]:
    """``entries`` of the list that a file's object has under ``name``. Raises UserError."""
    loaded = load(path)
    if not isinstance(loaded, dict) or name not in loaded:
        raise UserError(f'{path} has no "{name}" (it holds {kind(loaded)}); {form} is wanted')
    return entries(path, loaded[name], form, what)


def keyed(
    path: Path, found: Sequence[Entry], name: str, form: str, noun: str = "entry", *,
    unique: bool = False,
) -> Iterator[tuple[str, str, Entry]]:  # fmt: skip
    """Each entry with its place, for messages, and its id ``name``. Raises UserError."""
    seen = set()
    for place, entry in enumerate(found):
        where = f"{path}: {noun} {place}"
        key = identity(where, entry, name, form)
        where = f"{where} ({name.removesuffix('_id')} {key})"
        if unique and key in seen:
            raise UserError(f"{where} repeats an earlier one; each {name} may occur once")
        seen.add(key)
        yield where, key, entry


def identity(where: str, entry: Entry, name: str, form: str) -> str:
    """An id as text, whether the file has it as a text or a whole number. Raises UserError."""
    value = entry.get(name)
    if isinstance(value, bool) or not isinstance(value, int | str):
        wanted = f"{form} is wanted, with a number or a text as {name}"
        raise UserError(f"{where}: {_fault(entry, name)}; {wanted}")
    return str(value)


def string(where: str, entry: Entry, name: str, form: str) -> str:
    """A text of an entry. Raises UserError."""
    value = entry.get(name)
    if not isinstance(value, str):
        raise UserError(f"{where}: {_fault(entry, name)}; {form} is wanted")
    return value


def filled(where: str, entry: Entry, name: str, form: str) -> list[Any]:
    """A list of an entry, with at least one item. Raises UserError."""
    value = entry.get(name)
    if not isinstance(value, list) or not value:
        given = "an empty list" if value == [] else kind(value)
        raise UserError(f"{where}: {name} is {given}; {form} is wanted")
    return value


def _fault(entry: Entry, name: str) -> str:
    return f"the {name} is {kind(entry[name])}" if name in entry else f"there is no {name}"


def kind(value: Any) -> str:
    """What a JSON value is, in words."""
    return _KINDS[type(value)]
