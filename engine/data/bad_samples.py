"""Samples that could not be used: named in a file, counted by cause, and bounded in share."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

from engine.errors import UserError

_MIN_SEEN = 100  # samples read before the share means anything
_MAX_LINES = 100_000  # of the file; further bad samples are counted, not named
_MAX_DETAIL = 300  # characters
_NUM_NAMED = 5  # in the message that stops a run


@dataclass(frozen=True, slots=True)
class BadRecord:
    """A sample left out of a batch."""

    step: int | None
    dataset: str
    index: int
    key: str
    cause: str
    detail: str = ""

    def to_json(self) -> dict[str, Any]:
        """A plain dict, for gathering over ranks and for the file."""
        return asdict(self)


def summary(records: Iterable[BadRecord]) -> str:
    """``3 missing, 1 truncated (coco a.jpg, coco b.jpg, …)``: counts by cause, first names."""
    records = list(records)
    named = [f"{record.dataset} {record.key}" for record in records[:_NUM_NAMED]]
    more = ["…"] if len(records) > _NUM_NAMED else []
    counts = Counter(record.cause for record in records)
    return f"{_by_cause(counts)} ({', '.join(named + more)})"


def _by_cause(counts: Counter[str]) -> str:
    return ", ".join(f"{number} {cause}" for cause, number in counts.most_common())


class BadSamples:
    """Bookkeeping of a run's bad samples; every rank is given the same gathered records.

    ``counts`` holds readings by cause and ``seen`` all samples read, both since this process
    started. The file gets each (dataset, index, cause) once, over all epochs and resumes; only the
    rank with ``write`` touches it.
    """

    def __init__(self, path: Path, max_fraction: float, *, write: bool = True) -> None:
        self.path, self.max_fraction = Path(path), max_fraction
        self.counts: Counter[str] = Counter()
        self.seen = 0
        self._first: list[BadRecord] = []
        self._write = write
        self._known: set[tuple[str, int, str]] = set()
        if write and self.path.exists():
            self._read_known()

    @property
    def total(self) -> int:
        """Bad readings so far."""
        return self.counts.total()

    def add(
        self,
        records: Iterable[BadRecord | dict[str, Any]],
        seen: int,
        *,
        epoch_end: bool = False,
    ) -> None:
        """Note the bad ones among ``seen`` further samples, both over all ranks.

        Raises UserError when there are too many: at an epoch's end, more than ``max_fraction`` of
        the samples read; before that, from 100 samples on, more by three standard deviations (of a
        Poisson count), so that a few bad samples early on do not stop a run whose share is fine.
        """
        found = [BadRecord(**r) if isinstance(r, dict) else r for r in records]
        self.seen += seen
        self.counts.update(record.cause for record in found)
        self._first += found[: _NUM_NAMED - len(self._first)]
        if self._write:
            self._append(found)
        allowed = self.max_fraction * self.seen
        if not epoch_end:
            allowed += 3 * allowed**0.5
        if self.total > allowed and (epoch_end or self.seen >= _MIN_SEEN):
            self._stop()

    def _stop(self) -> NoReturn:
        named = "\n".join(
            f"  {r.dataset} {r.key} (row {r.index}): {r.cause}{': ' if r.detail else ''}{r.detail}"
            for r in self._first
        )
        raise UserError(
            f"{self.total} of {self.seen} samples read cannot be used ({_by_cause(self.counts)}), "
            f"more than data.max_bad_fraction {self.max_fraction:g} allows; the first:\n{named}\n"
            f"All are listed in {self.path}. Repair or remove them, or raise data.max_bad_fraction",
            key="data.max_bad_fraction",
        )

    def describe(self) -> str:
        """How many were left out so far, of which causes, and where they are named."""
        return (
            f"{self.total:,} of {self.seen:,} samples read were left out "
            f"({_by_cause(self.counts)}): {self.path}"
        )

    def _append(self, records: list[BadRecord]) -> None:
        lines = []
        for record in records:
            identity = (record.dataset, record.index, record.cause)
            if identity not in self._known and len(self._known) < _MAX_LINES:
                self._known.add(identity)
                row = {**record.to_json(), "detail": record.detail[:_MAX_DETAIL]}
                lines.append(json.dumps(row, ensure_ascii=False) + "\n")
        if lines:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf8", errors="backslashreplace") as file:
                file.writelines(lines)

    def _read_known(self) -> None:
        text = self.path.read_text(encoding="utf8", errors="replace")
        for line in text.splitlines():
            try:
                row = json.loads(line)
                self._known.add((row["dataset"], row["index"], row["cause"]))
            except (ValueError, KeyError, TypeError):
                continue  # torn by a kill while it was written
        if text and not text.endswith("\n"):
            with self.path.open("a", encoding="utf8") as file:
                file.write("\n")
