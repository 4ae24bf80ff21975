"""metrics.jsonl: one JSON object a line, the record of a run that every other log can be made from.

JSON has no NaN or infinity: both are written as ``null``, so that any reader can parse the file.
"""

import contextlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class JsonLines:
    """Appends rows to a file, each flushed with its line.

    Rows later than ``resume_step`` come from a future that was lost (the run went on after its last
    checkpoint, then died): they are dropped before the first append, so that every step is in the
    file once. So are lines that do not parse (a write cut short). None keeps all that parses.
    """

    def __init__(self, path: Path, resume_step: int | None = None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            _keep(path, math.inf if resume_step is None else resume_step)
        self._file = path.open("a", encoding="utf8", buffering=1)  # 1: a flush after each line

    def row(self, row: dict[str, Any]) -> None:
        """Write one row."""
        self._file.write(dumps(row) + "\n")

    def close(self) -> None:
        """Close the file; further rows are an error."""
        self._file.close()


def dumps(row: dict[str, Any]) -> str:
    """A row as one line of JSON; what is not finite as null."""
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in row.items()
    }
    return json.dumps(finite, allow_nan=False, ensure_ascii=False)


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The file's rows in order; lines that are not JSON objects are skipped."""
    with path.open(encoding="utf8", errors="replace") as lines:
        for line in lines:
            with contextlib.suppress(ValueError):
                if isinstance(row := json.loads(line), dict):
                    yield row


def _keep(path: Path, last_step: float) -> None:
    """Rewrite the file without rows later than ``last_step``; whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf8") as out:
        for row in read(path):
            if row.get("step", 0) <= last_step:
                out.write(dumps(row) + "\n")
        out.flush()
        os.fsync(out.fileno())
    temporary.replace(path)
