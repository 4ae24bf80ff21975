"""Counts → the figures that are reported: one table for the terminal and for the page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from engine.data.inspect.read import Counts, Example, Part


@dataclass
class Copy:
    """An image that is there more than once: the part it is in, its number there, its name."""

    part: int
    image: int
    key: str


@dataclass
class Findings:
    """All that is reported; ``counts`` and ``examples`` stand in the order of ``parts``."""

    parts: list[Part]
    max_tokens: int
    counts: list[Counts]
    examples: list[list[Example]]
    copies: list[list[Copy]] = field(default_factory=list)
    bad_names: dict[tuple[int, str], list[str]] = field(default_factory=dict)  # the first of each

    @property
    def titles(self) -> list[str]:
        return [part.title for part in self.parts]

    @property
    def leaks(self) -> list[list[Copy]]:
        """Copies of which some are in a train and some in a valid split."""
        return [group for group in self.copies if self._num_splits(group) > 1]

    @property
    def repeated(self) -> list[list[Copy]]:
        """Copies that are all in train splits, or all in valid ones."""
        return [group for group in self.copies if self._num_splits(group) == 1]

    def _num_splits(self, group: list[Copy]) -> int:
        return len({self.parts[copy.part].source.split for copy in group})


def mean(counts: Mapping[int, int]) -> float:
    """The mean of the values counted."""
    return sum(value * times for value, times in counts.items()) / sum(counts.values())


def median(counts: Mapping[int, int]) -> float:
    """The median; of an even number of values, the mean of the middle two."""
    total = sum(counts.values())
    middle = [(total - 1) // 2, total // 2]
    found: list[int] = []
    seen = 0
    for value in sorted(counts):
        seen += counts[value]
        while len(found) < 2 and seen > middle[len(found)]:
            found.append(value)
    return sum(found) / 2


def std(counts: Mapping[int, int]) -> float:
    """The standard deviation of all values, not an estimate from a sample of them."""
    centre = mean(counts)
    squares = sum((value - centre) ** 2 * times for value, times in counts.items())
    return float((squares / sum(counts.values())) ** 0.5)


def spread(counts: Mapping[int, int]) -> str:
    """Mean, median and standard deviation in a cell."""
    if not counts:
        return "–"
    return f"{mean(counts):.1f} / {median(counts):g} / {std(counts):.1f}"


def table(findings: Findings) -> list[tuple[str, list[str]]]:
    """Rows of the report: a name, and a value for each part."""
    rows: list[tuple[str, list[str]]] = []

    def row(name: str, values: Sequence[str]) -> None:
        if any(value not in ("", "–", "0") for value in values):
            rows.append((name, list(values)))

    counts = findings.counts
    row("samples", [f"{each.rows:,}" for each in counts])
    row("images", [f"{each.images:,}" for each in counts])
    row("of samples in all", [_share(part, each) for part, each in _pairs(findings)])
    row("text alone", [f"{each.text_alone:,}" for each in counts])
    row("bad samples", [f"{each.causes.total():,}" for each in counts])
    row("copies", [f"{number:,}" for number in copies_within(findings)])
    row("bytes of an image, mean", [_per_image(each) for each in counts])
    row("kinds", [", ".join(f"{k} {n:,}" for k, n in e.kinds.most_common()) for e in counts])
    row("width, mean / median / std", [spread(side(each, 0)) for each in counts])
    row("height", [spread(side(each, 1)) for each in counts])
    row("captions an image", [spread(each.captions) for each in counts])
    row("words a caption", [spread(each.words) for each in counts])
    row("tokens a caption", [spread(each.tokens) for each in counts])
    limit = f"longer than {findings.max_tokens} tokens"
    row(limit, [_longer(each.tokens, findings.max_tokens) for each in counts])
    row("turns a conversation", [spread(each.turns) for each in counts])
    row("tokens a conversation", [spread(each.turn_tokens) for each in counts])
    row("answers a question", [spread(each.answers) for each in counts])
    row("different labels", [f"{len(each.labels):,}" for each in counts])
    return rows


def _pairs(findings: Findings) -> list[tuple[Part, Counts]]:
    return list(zip(findings.parts, findings.counts, strict=True))


def _share(part: Part, counts: Counts) -> str:
    """The dataset's size where only a part of it was read."""
    total = len(part.source)
    return "" if counts.rows == total else f"{total:,}"


def _per_image(counts: Counts) -> str:
    return f"{counts.bytes / counts.images:,.0f}" if counts.images else "–"


def _longer(tokens: Counter[int], bound: int) -> str:
    if not tokens:
        return "–"
    cut = sum(times for value, times in tokens.items() if value > bound)
    return f"{100 * cut / tokens.total():.1f} %"


def side(counts: Counts, which: int) -> Counter[int]:
    """Widths (0) or heights (1)."""
    found: Counter[int] = Counter()
    for size, times in counts.sizes.items():
        found[size[which]] += times
    return found


def copies_within(findings: Findings) -> list[int]:
    """For each part, the images that are copies of an earlier one of it."""
    numbers = [0] * len(findings.parts)
    for group in findings.copies:
        for part, times in Counter(copy.part for copy in group).items():
            numbers[part] += times - 1
    return numbers


def causes(findings: Findings) -> list[tuple[str, str, int, str]]:
    """Bad samples: part, cause, number, the first few names."""
    return [
        (part.title, cause, number, ", ".join(findings.bad_names.get((place, cause), [])))
        for place, (part, counts) in enumerate(_pairs(findings))
        for cause, number in counts.causes.most_common()
    ]
