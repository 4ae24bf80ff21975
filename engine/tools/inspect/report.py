"""What was found: a table in the terminal, an HTML file that needs no network, contact sheets."""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.table import Table
from rich.text import Text

from engine.logs.charts import COLOURS, Chart, svg
from engine.logs.report import render
from engine.tools.inspect.scan import Copy, Counts, Example, Findings, Part
from engine.types import Row

COLUMNS, ROWS = 6, 4
_CELL, _MARGIN, _LINES, _LINE = 200, 10, 5, 15  # pixels; lines of text
_FONT_SIZE = 12
_NUM_GROUPS = 200  # of copies listed on the page
_NUM_NAMED = 10  # in the terminal
_NUM_COPIES = 6  # of one image
_NUM_LABELS = 30
_NUM_CHARS = 600  # of a text on the page
_BINS = 40  # of a histogram


# Figures.


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


def _spread(counts: Mapping[int, int]) -> str:
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
    pairs = zip(findings.parts, counts, strict=True)
    row("samples", [f"{each.rows:,}" for each in counts])
    row("images", [f"{each.images:,}" for each in counts])
    row("of samples in all", [_share(part, each) for part, each in pairs])
    row("text alone", [f"{each.text_alone:,}" for each in counts])
    row("bad samples", [f"{each.causes.total():,}" for each in counts])
    row("copies", [f"{number:,}" for number in _copies_within(findings)])
    row("bytes of an image, mean", [_per_image(each) for each in counts])
    row("kinds", [", ".join(f"{k} {n:,}" for k, n in e.kinds.most_common()) for e in counts])
    row("width, mean / median / std", [_spread(_side(each, 0)) for each in counts])
    row("height", [_spread(_side(each, 1)) for each in counts])
    row("captions an image", [_spread(each.captions) for each in counts])
    row("words a caption", [_spread(each.words) for each in counts])
    row("tokens a caption", [_spread(each.tokens) for each in counts])
    limit = f"longer than {findings.max_tokens} tokens"
    row(limit, [_longer(each.tokens, findings.max_tokens) for each in counts])
    row("turns a conversation", [_spread(each.turns) for each in counts])
    row("tokens a conversation", [_spread(each.turn_tokens) for each in counts])
    row("answers a question", [_spread(each.answers) for each in counts])
    row("different labels", [f"{len(each.labels):,}" for each in counts])
    return rows


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


def _side(counts: Counts, which: int) -> Counter[int]:
    """Widths (0) or heights (1)."""
    found: Counter[int] = Counter()
    for size, times in counts.sizes.items():
        found[size[which]] += times
    return found


def _copies_within(findings: Findings) -> list[int]:
    """For each part, the images that are copies of an earlier one of it."""
    numbers = [0] * len(findings.parts)
    for group in findings.copies:
        for part, times in Counter(copy.part for copy in group).items():
            numbers[part] += times - 1
    return numbers


def _causes(findings: Findings) -> list[tuple[str, str, int, str]]:
    """Bad samples: part, cause, number, the first few names."""
    return [
        (part.title, cause, number, ", ".join(findings.bad_names.get((place, cause), [])))
        for place, (part, counts) in enumerate(zip(findings.parts, findings.counts, strict=True))
        for cause, number in counts.causes.most_common()
    ]


# The page.


def page(title: str, findings: Findings) -> str:
    """The whole document as text."""
    return render(
        "page.html",
        "engine.tools.inspect",
        title=title,
        titles=findings.titles,
        rows=table(findings),
        charts=_charts(findings),
        copies=[
            ("Images of both train and valid", _named_groups(findings, findings.leaks)),
            ("Other copies", _named_groups(findings, findings.repeated)),
        ],
        num_groups=_NUM_GROUPS,
        causes=_causes(findings),
        labels=_labels(findings),
        galleries=[
            (name, [_article(example) for example in examples])
            for name, examples in zip(findings.titles, findings.examples, strict=True)
        ],
    )


def _named_groups(findings: Findings, groups: list[list[Copy]]) -> list[str]:
    return [_named(findings, group) for group in groups]


def _named(findings: Findings, group: list[Copy]) -> str:
    """``mine train a.jpg = mine valid b.jpg``; of each part at least one."""
    earlier: Counter[int] = Counter()
    order = []
    for copy in group:
        order.append((earlier[copy.part], copy.part, copy.key))
        earlier[copy.part] += 1
    named = [f"{findings.titles[part]} {key}" for _, part, key in sorted(order)[:_NUM_COPIES]]
    return " = ".join(named) + (" = …" if len(order) > _NUM_COPIES else "")


def _labels(findings: Findings) -> list[tuple[str, list[str]]]:
    """The most frequent labels, and how often each part has them."""
    found: Counter[str] = Counter()
    for counts in findings.counts:
        found += counts.labels
    names = [name for name, _ in found.most_common(_NUM_LABELS)]
    return [(n, [f"{counts.labels[n]:,}" for counts in findings.counts]) for n in names]


def _article(example: Example) -> dict[str, Any]:
    first = example.records[0]
    texts = [record.caption for record in example.records]
    if first.turns:
        texts = [f"{who}: {text}" for record in example.records for who, text in record.turns]
    notes = [example.key]
    notes += [f"answers: {' | '.join(first.answers)}"] * bool(first.answers)
    notes += [f"labels: {', '.join(first.labels)}"] * bool(first.labels)
    return {
        "jpeg": base64.b64encode(example.jpeg).decode(),
        "texts": [text[:_NUM_CHARS] for text in texts],
        "notes": [note[:_NUM_CHARS] for note in notes],
    }


def _charts(findings: Findings) -> list[Chart]:
    counts = dict(zip(findings.titles, findings.counts, strict=True))
    drawn = (
        ("Width", "pixels", {n: _side(c, 0) for n, c in counts.items()}),
        ("Height", "pixels", {n: _side(c, 1) for n, c in counts.items()}),
        ("Length of a caption", "tokens", {n: c.tokens for n, c in counts.items()}),
        ("Length of a caption", "words", {n: c.words for n, c in counts.items()}),
        ("Length of a conversation", "tokens", {n: c.turn_tokens for n, c in counts.items()}),
        ("Length of a conversation", "turns", {n: c.turns for n, c in counts.items()}),
    )
    return [
        Chart(
            f"{title}, {unit}",
            [(name, "") for name, each in series.items() if each],
            histogram(series),
        )
        for title, unit, series in drawn
        if any(series.values())
    ]


def histogram(series: Mapping[str, Mapping[int, int]]) -> str:
    """An SVG with the share of each bin, in percent, an outline a series that has any values."""
    edges, shares = bins([counts for counts in series.values() if counts])

    def draw(axes: Any) -> None:
        for each, colour in zip(shares, COLOURS * len(shares), strict=False):
            axes.stairs(each, edges, fill=True, color=colour, alpha=0.18, clip_on=False)
            axes.stairs(each, edges, color=colour, clip_on=False)
        axes.set(xlim=(edges[0], edges[-1]), ylim=(0, None))
        axes.yaxis.set_major_formatter("{x:g} %")

    return svg(draw)


def bins(series: Sequence[Mapping[int, int]]) -> tuple[list[int], list[list[float]]]:
    """The edges of bins that all series share, and the percentage of each series in each bin.

    The last bin holds the highest half percent too where that is far above the others.
    """
    low = min(min(counts) for counts in series)
    bound = max(_quantile(counts, 0.995) for counts in series)
    width = max(1, -(-(bound + 1 - low) // _BINS))
    number = (bound - low) // width + 1
    shares = []
    for counts in series:
        inside = [0] * number
        for value, times in counts.items():
            inside[min((value - low) // width, number - 1)] += times
        shares.append([100 * times / sum(inside) for times in inside])
    return [low + place * width for place in range(number + 1)], shares


def _quantile(counts: Mapping[int, int], share: float) -> int:
    wanted, seen = share * sum(counts.values()), 0
    for value in sorted(counts):
        seen += counts[value]
        if seen >= wanted:
            return value
    return max(counts)


def show(findings: Findings, console: Console) -> None:
    """Print the table, and what is wrong with the data."""
    printed = Table("")
    for title in findings.titles:
        printed.add_column(Text(title), justify="right")
    for name, values in table(findings):
        printed.add_row(name, *map(Text, values))
    console.print(printed)
    for title, cause, number, named in _causes(findings):
        console.print(Text(f"{title}: {number:,} bad, {cause}: {named}"))
    for what, groups in (
        ("images are in both train and valid", findings.leaks),
        ("images are there more than once in a split", findings.repeated),
    ):
        if groups:
            console.print(Text(f"{len(groups):,} {what}:"))
        for group in groups[:_NUM_NAMED]:
            console.print(Text(f"  {_named(findings, group)}"))


# Contact sheets.


def write_sheet(path: Path, title: str, examples: Sequence[Example]) -> None:
    """Write the sheet, whole or not at all."""
    font = ImageFont.load_default(_FONT_SIZE)
    height = _CELL + _LINES * _LINE + _MARGIN
    rows = -(-len(examples) // COLUMNS)
    size = (COLUMNS * (_CELL + _MARGIN) + _MARGIN, rows * height + 3 * _MARGIN)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((_MARGIN, _MARGIN // 2), title, "black", font)
    for number, example in enumerate(examples):
        down, across = divmod(number, COLUMNS)
        left = _MARGIN + across * (_CELL + _MARGIN)
        top = 3 * _MARGIN + down * height
        with Image.open(io.BytesIO(example.jpeg)) as opened:
            picture = opened.convert("RGB")
        picture.thumbnail((_CELL, _CELL))
        sheet.paste(picture, (left, top + _CELL - picture.height))
        for line, text in enumerate(_wrapped(_one_line(example.records[0]), font)):
            draw.text((left, top + _CELL + 3 + line * _LINE), text, "black", font)
    temporary = path.with_name(f".{path.name}.making")
    sheet.save(temporary, "PNG")
    temporary.replace(path)


def _one_line(record: Row) -> str:
    """A row's texts in one line: its caption, or who says what, and its labels."""
    text = record.caption
    if record.turns:
        text = " ".join(f"{who}: {what}" for who, what in record.turns)
    if record.labels and ", ".join(record.labels) != record.caption:
        text += f" [{', '.join(record.labels)}]"
    return " ".join(text.split())


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    """Lines that fit into a cell; a word longer than a line is cut."""
    lines = [""]
    for word in text[:1000].split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= _CELL:
            lines[-1] = longer
            continue
        if len(lines) == _LINES:
            lines[-1] += " …"
            break
        while word and font.getlength(word) > _CELL:
            word = word[:-1]
        lines.append(word)
    return [line for line in lines if line]
