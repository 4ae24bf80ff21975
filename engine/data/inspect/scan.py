"""One pass over all datasets in several processes; what is found is put together in their order."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console

from engine.data.bad_samples import BadRecord
from engine.data.inspect.figures import Copy, Findings
from engine.data.inspect.image_hash import TINY, find_copies
from engine.data.inspect.read import Chunk, Counts, Part, Work, read_chunk
from engine.tools import jobs
from engine.types import BadSample

COPIES_FILE, BAD_FILE = "copies.jsonl", "bad_samples.jsonl"
_CHUNK = 64  # images that a process reads at once
_NUM_NAMED = 5  # bad samples of each cause
_TINY_BYTES = TINY * TINY * 3

Item = tuple[int, int, int]  # a part and the bounds of a chunk of its images


def scan(work: Work, max_tokens: int, num_jobs: int, console: Console, output: Path) -> Findings:
    """Read all parts; writes ``bad_samples.jsonl`` and ``copies.jsonl`` into ``output``.

    Memory is bounded: what is kept of each image for the search of copies lies on disk.
    """
    findings = Findings(
        work.parts, max_tokens, [Counts() for _ in work.parts], [[] for _ in work.parts]
    )
    items: list[Item] = [
        (number, first, min(first + _CHUNK, len(part.images)))
        for number, part in enumerate(work.parts)
        for first in range(0, len(part.images), _CHUNK)
    ]
    total = sum(len(part.images) for part in work.parts)
    with (
        tempfile.TemporaryDirectory(prefix=".making-", dir=output) as scratch,
        (output / BAD_FILE).open("w", encoding="utf8", errors="replace") as bad_file,
        jobs.progress_bar("inspecting", total, console) as tick,
    ):
        signatures = _Signatures(Path(scratch), total)
        for chunk in _in_order(work, items, num_jobs, tick):
            findings.counts[chunk.part].add(chunk.counts)
            findings.examples[chunk.part] += chunk.examples
            signatures.add(chunk)
            for bad in chunk.bad:
                _name(findings, chunk.part, bad)
                bad_file.write(json.dumps(bad.to_json(), ensure_ascii=False) + "\n")
        findings.copies = signatures.copies(work.parts)
    _write_copies(output / COPIES_FILE, findings)
    return findings


def _in_order(work: Work, items: Sequence[Item], num_jobs: int, tick: jobs.Tick) -> Iterator[Chunk]:
    """The chunks as ``items`` has them, each held back until those before it are there."""
    waiting: dict[tuple[int, int], Chunk] = {}
    following = iter(items)
    wanted = next(following, None)
    for chunk in jobs.each(read_chunk, work, items, jobs=num_jobs, tick=tick):
        waiting[chunk.part, chunk.first] = chunk
        while wanted is not None and wanted[:2] in waiting:
            yield waiting.pop(wanted[:2])
            wanted = next(following, None)


def _name(findings: Findings, part: int, bad: BadRecord) -> None:
    named = findings.bad_names.setdefault((part, bad.cause), [])
    if len(named) < _NUM_NAMED:
        named.append(bad.key)


class _Signatures:
    """Hash and tiny picture of every image, in files that are mapped into memory."""

    def __init__(self, folder: Path, total: int) -> None:
        shape = max(total, 1)
        self._hashes = np.memmap(folder / "hashes", np.uint64, "w+", shape=shape)
        self._tinies = np.memmap(folder / "tinies", np.uint8, "w+", shape=(shape, _TINY_BYTES))
        self._images = np.memmap(folder / "images", np.int64, "w+", shape=(shape, 2))
        self._number = 0

    def add(self, chunk: Chunk) -> None:
        first, end = self._number, self._number + len(chunk.hashes)
        self._hashes[first:end], self._tinies[first:end] = chunk.hashes, chunk.tinies
        self._images[first:end, 0], self._images[first:end, 1] = chunk.part, chunk.places
        self._number = end

    def copies(self, parts: Sequence[Part]) -> list[list[Copy]]:
        """Groups of images that are copies of one another, named."""
        found = find_copies(self._hashes[: self._number], self._tinies[: self._number])
        return [[_copy(parts, *self._images[place].tolist()) for place in group] for group in found]


def _copy(parts: Sequence[Part], number: int, place: int) -> Copy:
    part = parts[number]
    image = int(part.images[place])
    for row in part.groups[image].tolist():
        try:
            return Copy(number, image, part.source[row].key)
        except BadSample:
            continue
    return Copy(number, image, f"image {image + 1}")


def _write_copies(path: Path, findings: Findings) -> None:
    """A line a group: ``[[dataset and split, name], …]``."""
    with path.open("w", encoding="utf8", errors="replace") as file:
        for group in findings.copies:
            named = [[findings.titles[copy.part], copy.key] for copy in group]
            file.write(json.dumps(named, ensure_ascii=False) + "\n")
