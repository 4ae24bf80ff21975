"""What was found, as one HTML file that needs no network, and as a table in the terminal."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Iterable
from html import escape

from rich.console import Console
from rich.table import Table
from rich.text import Text

from engine.data.inspect import figures
from engine.data.inspect.figures import Copy, Findings
from engine.data.inspect.read import Example
from engine.logs.histogram import histogram
from engine.logs.stylesheet import STYLE

_NUM_GROUPS = 200  # of copies listed on the page
_NUM_NAMED = 10  # in the terminal
_NUM_COPIES = 6  # of one image
_NUM_LABELS = 30
_NUM_CHARS = 600  # of a text on the page


def page(title: str, findings: Findings) -> str:
    """The whole document as text."""
    sections = [
        f"<h1>{escape(title)}</h1>",
        _table(findings),
        _section("Distributions", f'<div class="charts">{_charts(findings)}</div>'),
        _section("Images of both train and valid", _copies(findings, findings.leaks)),
        _section("Other copies", _copies(findings, findings.repeated)),
        _section("Bad samples", _bad(findings)),
        _section("Labels", _labels(findings)),
    ]
    for name, examples in zip(findings.titles, findings.examples, strict=True):
        shown = "".join(_example(example) for example in examples)
        sections.append(_section(name, f'<div class="gallery">{shown}</div>' if shown else ""))
    return _HEAD.format(title=escape(title), style=STYLE) + "".join(sections) + "</body></html>\n"


def _section(title: str, body: str) -> str:
    return f"<h2>{escape(title)}</h2>{body}" if body else ""


def _table(findings: Findings) -> str:
    return _rows(["", *findings.titles], ([name, *row] for name, row in figures.table(findings)))


def _rows(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table; the first cell of each row is its name."""
    titles = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = ""
    for name, *cells in rows:
        values = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        body += f"<tr><th>{escape(name)}</th>{values}</tr>"
    return f"<table><thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table>" if body else ""


def _charts(findings: Findings) -> str:
    counts = dict(zip(findings.titles, findings.counts, strict=True))
    drawn = (
        ("Width", "pixels", {n: figures.side(c, 0) for n, c in counts.items()}),
        ("Height", "pixels", {n: figures.side(c, 1) for n, c in counts.items()}),
        ("Length of a caption", "tokens", {n: c.tokens for n, c in counts.items()}),
        ("Length of a caption", "words", {n: c.words for n, c in counts.items()}),
        ("Length of a conversation", "tokens", {n: c.turn_tokens for n, c in counts.items()}),
        ("Length of a conversation", "turns", {n: c.turns for n, c in counts.items()}),
    )
    return "".join(histogram(title, series, unit) for title, unit, series in drawn)


def _copies(findings: Findings, groups: list[list[Copy]]) -> str:
    more = len(groups) - _NUM_GROUPS
    items = "".join(f"<li>{escape(_named(findings, group))}</li>" for group in groups[:_NUM_GROUPS])
    rest = f"<p>and {more:,} more in copies.jsonl</p>" if more > 0 else ""
    return f"<ol>{items}</ol>{rest}" if items else ""


def _named(findings: Findings, group: list[Copy]) -> str:
    """``mine train a.jpg = mine valid b.jpg``; of each part at least one."""
    order = sorted(group, key=lambda copy: (_place(group, copy), copy.part))
    named = [f"{findings.titles[copy.part]} {copy.key}" for copy in order[:_NUM_COPIES]]
    return " = ".join(named) + (" = …" if len(order) > _NUM_COPIES else "")


def _place(group: list[Copy], copy: Copy) -> int:
    return [other for other in group if other.part == copy.part].index(copy)


def _bad(findings: Findings) -> str:
    rows = [
        (title, cause, f"{number:,}", named)
        for title, cause, number, named in figures.causes(findings)
    ]
    return _rows(("", "cause", "samples", "the first"), rows)


def _labels(findings: Findings) -> str:
    found: Counter[str] = Counter()
    for counts in findings.counts:
        found += counts.labels
    names = [name for name, _ in found.most_common(_NUM_LABELS)]
    rows = ([n, *(f"{counts.labels[n]:,}" for counts in findings.counts)] for n in names)
    return _rows(["", *findings.titles], rows)


def _example(example: Example) -> str:
    image = "data:image/jpeg;base64," + base64.b64encode(example.jpeg).decode()
    first = example.records[0]
    texts = [record.caption for record in example.records]
    if first.turns:
        texts = [f"{who}: {text}" for record in example.records for who, text in record.turns]
    listed = "".join(f"<li>{escape(text[:_NUM_CHARS])}</li>" for text in texts)
    notes = [example.key]
    notes += [f"answers: {' | '.join(first.answers)}"] * bool(first.answers)
    notes += [f"labels: {', '.join(first.labels)}"] * bool(first.labels)
    told = "".join(f"<p>{escape(note[:_NUM_CHARS])}</p>" for note in notes)
    return f'<article><img alt="" src="{image}"><ol>{listed}</ol>{told}</article>'


def show(findings: Findings, console: Console) -> None:
    """Print the table, and what is wrong with the data."""
    table = Table("")
    for title in findings.titles:
        table.add_column(Text(title), justify="right")
    for name, values in figures.table(findings):
        table.add_row(name, *map(Text, values))
    console.print(table)
    for title, cause, number, named in figures.causes(findings):
        console.print(Text(f"{title}: {number:,} bad, {cause}: {named}"))
    for what, groups in (
        ("images are in both train and valid", findings.leaks),
        ("images are there more than once in a split", findings.repeated),
    ):
        if groups:
            console.print(Text(f"{len(groups):,} {what}:"))
        for group in groups[:_NUM_NAMED]:
            console.print(Text(f"  {_named(findings, group)}"))


_HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<style>{style}</style></head><body>
"""
