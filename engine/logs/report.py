"""report.html: one file with a run's curves, figures, examples and settings; needs no network."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

from engine.logs import charts, jsonl
from engine.logs.gallery import Example, article
from engine.logs.progress import duration, number
from engine.logs.run_log import METRICS_FILE
from engine.logs.samples import write_whole
from engine.logs.stylesheet import STYLE

REPORT_FILE = "report.html"
# figures with a curve, a line a dataset
_DRAWN = ("RSUM", "accuracy@1", "CIDEr", "CLIPScore", "accuracy")
_TILES = ("/RSUM", "/accuracy@1", "/CIDEr", "/accuracy")
_KNOWN = frozenset(
    (
        *("step", "epoch", "seconds", "samples_seen", "bad_samples"),
        *("lr", "samples_per_second", "data_wait", "batch_R@1"),
    )
)


def write_report(
    run_dir: Path,
    *,
    name: str = "",
    settings: str | None = None,
    galleries: Mapping[str, Sequence[Example]] | None = None,
) -> Path:
    """Write ``run_dir/report.html`` from its metrics.jsonl, whole or not at all; returns its path.

    ``settings`` is the resolved configuration's text (default: ``run_dir/config.yaml``),
    ``galleries`` the examples by dataset.
    """
    if settings is None:
        config = run_dir / "config.yaml"
        settings = config.read_text(encoding="utf8") if config.exists() else ""
    metrics = run_dir / METRICS_FILE
    rows = list(jsonl.read(metrics)) if metrics.exists() else []
    text = page(name or run_dir.resolve().name, rows, settings, galleries or {})
    return write_whole(run_dir / REPORT_FILE, text)


def page(
    name: str,
    rows: list[dict[str, Any]],
    settings: str,
    galleries: Mapping[str, Sequence[Example]],
) -> str:
    """The whole document as text."""
    training = [row for row in rows if "lr" in row]
    evaluations = [row for row in rows if any("/" in key for key in row)]
    sections = [
        f"<header><h1>{escape(name)}</h1>{_tiles(training, evaluations)}</header>",
        _section("Curves", _curves(training, evaluations), "charts"),
        _section("Last evaluation", _table(evaluations), "wide"),
        *(_gallery(f"Examples: {dataset}", shown) for dataset, shown in galleries.items()),
        _section("Settings", f"<pre>{escape(settings)}</pre>" if settings else ""),
    ]
    return _HEAD.format(title=escape(name), style=STYLE) + "".join(sections) + "</body></html>\n"


def write_gallery(path: Path, title: str, section: str, examples: Sequence[Example]) -> None:
    """A page of examples alone, whole or not at all."""
    head = _HEAD.format(title=escape(title), style=STYLE)
    body = _gallery(section, examples)
    write_whole(path, f"{head}<header><h1>{escape(title)}</h1></header>{body}</body></html>\n")


def _section(title: str, body: str, shape: str = "") -> str:
    return f'<h2>{escape(title)}</h2><div class="{shape}">{body}</div>' if body else ""


def _gallery(title: str, examples: Sequence[Example]) -> str:
    return _section(title, "".join(map(article, examples)), "gallery")


def _points(rows: list[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    return [
        (row["step"], value)
        for row in rows
        if isinstance(value := row.get(key), int | float) and math.isfinite(value)
    ]


def _keys(rows: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for row in rows for key in row))


def _curves(training: list[dict[str, Any]], evaluations: list[dict[str, Any]]) -> str:
    losses = [key for key in _keys(training) if key not in _KNOWN and "/" not in key]
    scalars = [key for key in losses if "loss" not in key]
    drawn = [
        charts.line_chart("Loss", {key: _points(training, key) for key in losses if "loss" in key}),
        *_evaluation_curves(evaluations),
        charts.line_chart("R@1 within the batch", {"R@1": _points(training, "batch_R@1")}),
        charts.line_chart("Learning rate", {"lr": _points(training, "lr")}),
        *(charts.line_chart(key, {key: _points(training, key)}) for key in scalars),
        charts.line_chart("Samples a second", {"last": _points(training, "samples_per_second")}),
        charts.line_chart(
            "Waiting for data, share of a step", {"last": _points(training, "data_wait")}
        ),
    ]
    return "".join(drawn)


def _evaluation_curves(evaluations: list[dict[str, Any]]) -> Iterable[str]:
    for metric in _DRAWN:
        keys = [key for key in _keys(evaluations) if key.endswith(f"/{metric}")]
        series = {key.removesuffix(f"/{metric}"): _points(evaluations, key) for key in keys}
        yield charts.line_chart(metric, series)


def _last(evaluations: list[dict[str, Any]]) -> dict[str, Any]:
    """The newest value of every evaluation figure."""
    values: dict[str, Any] = {}
    for row in evaluations:
        values.update({key: value for key, value in row.items() if "/" in key})
    return values


def _table(evaluations: list[dict[str, Any]]) -> str:
    values = _last(evaluations)
    if not values:
        return ""
    datasets = list(dict.fromkeys(key.rpartition("/")[0] for key in values))
    metrics = list(dict.fromkeys(key.rpartition("/")[2] for key in values))
    head = "".join(f"<th>{escape(dataset)}</th>" for dataset in datasets)
    body = "".join(
        f"<tr><th>{escape(metric)}</th>"
        + "".join(
            f"<td>{escape(number(values.get(f'{dataset}/{metric}')))}</td>" for dataset in datasets
        )
        + "</tr>"
        for metric in metrics
    )
    return f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table>"


def _tiles(training: list[dict[str, Any]], evaluations: list[dict[str, Any]]) -> str:
    tiles: list[tuple[str, str]] = []
    if training:
        tiles.append(("steps", f"{training[-1]['step']:,}"))
        tiles.append(("time", duration(_seconds(training))))
        if losses := _points(training, "loss"):
            tiles.append(("last loss", charts.label(losses[-1][1])))
        if speeds := [y for _, y in _points(training, "samples_per_second")]:
            tiles.append(("samples a second, median", charts.label(median(speeds))))
    for key, value in _last(evaluations).items():
        if key.endswith(_TILES) and "/shuffled_words/" not in key:
            tiles.append((key.replace("/", " "), number(value)))
    return "".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(title)}</span></div>'
        for title, value in tiles
    )


def _seconds(training: list[dict[str, Any]]) -> float:
    """Time spent over all starts of the run: each start counts its seconds from 0."""
    total = before = 0.0
    for row in training:
        now = row.get("seconds") or 0.0
        total += now - before if now >= before else now
        before = now
    return total


_HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<style>{style}</style></head><body>
"""
