"""Reading JSON and CSV files that users hand in, each mistake reported with its file and place."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from pathlib import Path
from typing import Any

from engine.errors import UserError

csv.field_size_limit(1 << 30)  # texts may be longer than the module expects


def load(path: Path) -> Any:
    """What a JSON file holds; one that gzip has packed is unpacked. Raises UserError.

    A file named ``.jsonl`` holds a list, an entry a line.
    """
    content = text(path)
    if ".jsonl" not in path.suffixes:
        return _parse(path, content)
    lines = enumerate(content.split("\n"), 1)
    return [_parse(path, line, f": line {number}") for number, line in lines if line.strip()]


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
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be unpacked: {error}") from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not text in UTF-8: {error}") from error


def _parse(path: Path, content: str, place: str = "") -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}{place} is not JSON in UTF-8: {error}") from error


def entries(path: Path, loaded: Any, form: str, what: str = "entries") -> list[dict[str, Any]]:
    """A list of objects, at least one; ``form`` shows one in messages. Raises UserError."""
    if not isinstance(loaded, list):
        raise UserError(f"{path} holds {kind(loaded)}; a list of {form} is wanted")
    if not loaded:
        raise UserError(f"{path} holds no {what}")
    for place, entry in enumerate(loaded):
        if not isinstance(entry, dict):
            raise UserError(f"{path}: entry {place} is {kind(entry)}, an object is wanted")
    return loaded


def identity(where: str, entry: dict[str, Any], name: str, form: str) -> str:
    """An id as text, whether the file has it as a text or a whole number. Raises UserError."""
    value = entry.get(name)
    if isinstance(value, bool) or not isinstance(value, int | str):
        found = f"the {name} is {kind(value)}" if name in entry else f"there is no {name}"
        raise UserError(f"{where}: {found}; {form} is wanted, with a number or a text as {name}")
    return str(value)


def string(where: str, entry: dict[str, Any], name: str, form: str) -> str:
    """A text of an entry. Raises UserError."""
    value = entry.get(name)
    if not isinstance(value, str):
        found = f"the {name} is {kind(value)}" if name in entry else f"there is no {name}"
        raise UserError(f"{where}: {found}; {form} is wanted")
    return value


def kind(value: Any) -> str:
    """What a JSON value is, in words."""
    if value is None:
        return "null"
    names = {bool: "true or false", int: "a number", float: "a number", str: "a text"}
    return {**names, list: "a list", dict: "an object"}[type(value)]
