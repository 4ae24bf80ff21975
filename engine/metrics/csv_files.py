"""Reading CSV files that users hand in, each mistake told with its file and line."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from engine.errors import UserError
from engine.metrics.json_files import text

Row = tuple[int, dict[str, str]]

csv.field_size_limit(1 << 30)  # texts may be longer than the module expects


def read_csv(path: Path) -> tuple[list[str], list[Row]]:
    """The columns of a CSV, or of a TSV by its ending, and its rows with each one's last line.

    Raises UserError for a file that cannot be read, has no header, or whose rows have other
    numbers of values than it has columns.
    """
    content = io.StringIO(text(path), newline="")
    delimiter = "\t" if path.suffix == ".tsv" else ","
    reader = csv.DictReader(content, delimiter=delimiter, strict=True)
    rows: list[Row] = []
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
