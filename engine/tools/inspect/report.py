"""What was found: a table in the terminal, an HTML file that needs no network, contact sheets."""

import base64
import io
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.table import Table

from engine.logs.charts import COLOURS, Chart, svg
from engine.logs.report import render
from engine.tools.inspect.scan import Copy, Findings, Part
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


def figures(counts: Mapping[int, int]) -> tuple[float, float, float]:
    """Mean, median and (not estimated) standard deviation of the values counted."""
    value_N, times_N = np.array(sorted(counts.items())).T
    mean = np.average(value_N, weights=times_N)
    std = np.average((value_N - mean) ** 2, weights=times_N) ** 0.5
    total, ends_N = times_N.sum(), times_N.cumsum()
    middle = value_N[np.searchsorted(ends_N, [(total - 1) // 2, total // 2], side="right")]
    return float(mean), float(middle.mean()), float(std)


def _spread(counts: Mapping[int, int]) -> str:
    return "{:.1f} / {:g} / {:.1f}".format(*figures(counts)) if counts else "–"


def table(findings: Findings) -> list[tuple[str, list[str]]]:
    """Rows of the report: a name, and a value for each part."""
    bound, counts = findings.max_tokens, [part.counts for part in findings.parts]
    rows = [
        ("samples", [f"{each.rows:,}" for each in counts]),
        ("images", [f"{each.images:,}" for each in counts]),
        ("of samples in all", [_samples_in_all(part) for part in findings.parts]),
        ("text alone", [f"{each.text_alone:,}" for each in counts]),
        ("bad samples", [f"{each.causes.total():,}" for each in counts]),
        ("copies", [f"{each.copies:,}" for each in counts]),
        (
            "bytes of an image, mean",
            [f"{e.bytes / e.images:,.0f}" if e.images else "–" for e in counts],
        ),
        ("kinds", [", ".join(f"{k} {n:,}" for k, n in e.kinds.most_common()) for e in counts]),
        ("width, mean / median / std", [_spread(each.widths) for each in counts]),
        ("height", [_spread(each.heights) for each in counts]),
        ("captions an image", [_spread(each.captions) for each in counts]),
        ("words a caption", [_spread(each.words) for each in counts]),
        ("tokens a caption", [_spread(each.tokens) for each in counts]),
        (f"longer than {bound} tokens", [_longer(each.tokens, bound) for each in counts]),
        ("turns a conversation", [_spread(each.turns) for each in counts]),
        ("tokens a conversation", [_spread(each.turn_tokens) for each in counts]),
        ("answers a question", [_spread(each.answers) for each in counts]),
        ("different labels", [f"{len(each.labels):,}" for each in counts]),
    ]
    return [row for row in rows if not {"", "–", "0"}.issuperset(row[1])]


def _samples_in_all(part: Part) -> str:
    """The dataset's size where only a part of it was read."""
    total = len(part.source)
    return "" if part.counts.rows == total else f"{total:,}"


def _longer(tokens: Counter[int], bound: int) -> str:
    if not tokens:
        return "–"
    cut = sum(times for value, times in tokens.items() if value > bound)
    return f"{100 * cut / tokens.total():.1f} %"


def _causes(findings: Findings) -> list[tuple[str, str, int, str]]:
    """Bad samples: part, cause, number, the first few names."""
    return [
        (part.title, cause, number, ", ".join(part.bad_names[cause]))
        for part in findings.parts
        for cause, number in part.counts.causes.most_common()
    ]


def page(title: str, findings: Findings) -> str:
    """The whole document as text."""
    labels = sum((part.counts.labels for part in findings.parts), Counter[str]())
    return render(
        "page.html",
        "engine.tools.inspect",
        title=title,
        titles=findings.titles,
        rows=table(findings),
        charts=_charts(findings),
        copies=[
            (what, [_named(findings, group) for group in findings.copies_in(number)])
            for what, number in (("Images of both train and valid", 2), ("Other copies", 1))
        ],
        num_groups=_NUM_GROUPS,
        causes=_causes(findings),
        labels=[
            (name, [f"{part.counts.labels[name]:,}" for part in findings.parts])
            for name, _ in labels.most_common(_NUM_LABELS)
        ],
        galleries=[
            (part.title, [_article(*example) for example in part.counts.examples])
            for part in findings.parts
        ],
    )


def _named(findings: Findings, group: list[Copy]) -> str:
    """``mine train a.jpg = mine valid b.jpg``; of each part at least one."""
    earlier: Counter[int] = Counter()
    order = []
    for part, key in group:
        order.append((earlier[part], part, key))
        earlier[part] += 1
    named = [f"{findings.titles[part]} {key}" for _, part, key in sorted(order)[:_NUM_COPIES]]
    return " = ".join(named) + (" = …" if len(order) > _NUM_COPIES else "")


def _article(jpeg: bytes, rows: Sequence[Row]) -> dict[str, Any]:
    first = rows[0]
    texts = [row.caption for row in rows]
    if first.turns:
        texts = [f"{who}: {text}" for row in rows for who, text in row.turns]
    notes = [first.key]
    notes += [f"answers: {' | '.join(first.answers)}"] * bool(first.answers)
    notes += [f"labels: {', '.join(first.labels)}"] * bool(first.labels)
    return {
        "jpeg": base64.b64encode(jpeg).decode(),
        "texts": [text[:_NUM_CHARS] for text in texts],
        "notes": [note[:_NUM_CHARS] for note in notes],
    }


def _charts(findings: Findings) -> list[Chart]:
    counts = [part.counts for part in findings.parts]
    drawn = (
        ("Width, pixels", [each.widths for each in counts]),
        ("Height, pixels", [each.heights for each in counts]),
        ("Length of a caption, tokens", [each.tokens for each in counts]),
        ("Length of a caption, words", [each.words for each in counts]),
        ("Length of a conversation, tokens", [each.turn_tokens for each in counts]),
        ("Length of a conversation, turns", [each.turns for each in counts]),
    )
    charts = []
    for title, series in drawn:
        shown = [(n, each) for n, each in zip(findings.titles, series, strict=True) if each]
        if shown:
            legend = [(name, "") for name, _ in shown]
            charts.append(Chart(title, legend, histogram([each for _, each in shown])))
    return charts


def histogram(series: Sequence[Mapping[int, int]]) -> str:
    """An SVG with the share of each bin, in percent, an outline a series."""
    edges, shares = bins(series)

    def draw(axes: Any) -> None:
        for each, colour in zip(shares, cycle(COLOURS), strict=False):
            axes.stairs(each, edges, fill=True, color=colour, alpha=0.18, clip_on=False)
            axes.stairs(each, edges, color=colour, clip_on=False)
        axes.set(xlim=(edges[0], edges[-1]), ylim=(0, None))
        axes.yaxis.set_major_formatter("{x:g} %")

    return svg(draw)


def bins(series: Sequence[Mapping[int, int]]) -> tuple[list[int], list[list[float]]]:
    """The edges of bins that all series share, and the percentage of each series in each bin.

    The last bin holds the highest half percent too where that is far above the others.
    """
    counted = [np.array(sorted(counts.items())).T for counts in series]
    low = min(int(value_N[0]) for value_N, _ in counted)
    bound = max(  # that 99.5 % of a series do not exceed
        int(value_N[np.searchsorted(times_N.cumsum(), 0.995 * times_N.sum())])
        for value_N, times_N in counted
    )
    width = max(1, -(-(bound + 1 - low) // _BINS))
    number = (bound - low) // width + 1
    shares = []
    for value_N, times_N in counted:
        place_N = np.minimum((value_N - low) // width, number - 1)
        inside_B = np.bincount(place_N, times_N, number)
        shares.append((100 * inside_B / inside_B.sum()).tolist())
    return [low + place * width for place in range(number + 1)], shares


def show(findings: Findings, console: Console) -> None:
    """Print the table, and what is wrong with the data."""
    printed = Table("")
    for title in findings.titles:
        printed.add_column(title, justify="right")
    for name, values in table(findings):
        printed.add_row(name, *values)
    console.print(printed)
    for title, cause, number, named in _causes(findings):
        console.print(f"{title}: {number:,} bad, {cause}: {named}")
    for what, num_splits in (
        ("images are in both train and valid", 2),
        ("images are there more than once in a split", 1),
    ):
        groups = findings.copies_in(num_splits)
        if groups:
            console.print(f"{len(groups):,} {what}:")
        for group in groups[:_NUM_NAMED]:
            console.print(f"  {_named(findings, group)}")


def write_sheet(folder: Path, title: str, examples: Sequence[tuple[bytes, list[Row]]]) -> None:
    """A contact sheet of a dataset's examples, written whole or not at all."""
    if not examples:
        return
    font = ImageFont.load_default(_FONT_SIZE)
    height = _CELL + _LINES * _LINE + _MARGIN
    rows = -(-len(examples) // COLUMNS)
    size = (COLUMNS * (_CELL + _MARGIN) + _MARGIN, rows * height + 3 * _MARGIN)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((_MARGIN, _MARGIN // 2), title, "black", font)
    for number, (jpeg, rows_of) in enumerate(examples):
        down, across = divmod(number, COLUMNS)
        left = _MARGIN + across * (_CELL + _MARGIN)
        top = 3 * _MARGIN + down * height
        with Image.open(io.BytesIO(jpeg)) as opened:
            picture = opened.convert("RGB")
        picture.thumbnail((_CELL, _CELL))
        sheet.paste(picture, (left, top + _CELL - picture.height))
        for line, text in enumerate(_wrapped(_one_line(rows_of[0]), font)):
            draw.text((left, top + _CELL + 3 + line * _LINE), text, "black", font)
    name = re.sub(r"[^\w.-]+", "_", title)
    temporary = folder / f".sheet_{name}.png.making"
    sheet.save(temporary, "PNG")
    temporary.replace(folder / f"sheet_{name}.png")


def _one_line(record: Row) -> str:
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
