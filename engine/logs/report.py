"""report.html: one file with a run's curves, figures, examples and settings; needs no network."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from engine.logs import jsonl
from engine.logs.charts import Chart, label, line_chart
from engine.logs.gallery import Example, article
from engine.logs.progress import by_dataset, duration, number
from engine.logs.run_log import METRICS_FILE
from engine.logs.samples import write_whole

REPORT_FILE = "report.html"
_KNOWN = frozenset({
    "step", "epoch", "seconds", "samples_seen", "bad_samples", "lr", "samples_per_second",
    "data_wait", "batch_R@1",
})  # fmt: skip

Row = dict[str, Any]


def write_report(
    run_dir: Path, *,
    galleries: Mapping[str, Sequence[Example]], curves: Sequence[str], headlines: Sequence[str],
) -> Path:  # fmt: skip
    """Write ``run_dir/report.html`` from its metrics.jsonl, whole or not at all; returns its path.

    ``galleries`` are the examples by dataset. Of an evaluation's figures (``RSUM``), ``curves`` are
    drawn over the steps, a line a dataset, and the last of ``headlines`` stand at the top.
    """
    config, metrics = run_dir / "config.yaml", run_dir / METRICS_FILE
    rows = list(jsonl.read(metrics)) if metrics.exists() else []
    training = [row for row in rows if "lr" in row]
    evaluations = [row for row in rows if any("/" in key for key in row)]
    last = {key: row[key] for row in evaluations for key in row if "/" in key}  # the newest
    datasets, figures = by_dataset(last)
    page = render(
        "report.html",
        title=run_dir.resolve().name,
        tiles=_tiles(training, last, headlines),
        charts=[chart for chart in _curves(training, evaluations, curves) if chart is not None],
        datasets=datasets,
        rows=[(metric, map(number, values)) for metric, values in figures],
        galleries=[
            (f"Examples: {dataset}", [article(example) for example in shown])
            for dataset, shown in galleries.items()
        ],
        settings=config.read_text(encoding="utf8") if config.exists() else "",
    )
    return write_whole(run_dir / REPORT_FILE, page)


def write_gallery(path: Path, title: str, section: str, examples: Sequence[Example]) -> None:
    """Write a page of examples alone, whole or not at all."""
    articles = [article(example) for example in examples]
    write_whole(path, render("report.html", title=title, galleries=[(section, articles)]))


def render(name: str, package: str = "", **values: Any) -> str:
    """A page from a template of this package, or of ``package``, which may build on these.

    Values are escaped; jinja2 is imported here, as only pages need it.
    """
    from jinja2 import ChoiceLoader, Environment, PackageLoader

    loaders = [PackageLoader(package, "")] if package else []
    loader = ChoiceLoader([*loaders, PackageLoader("engine.logs", "templates")])
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template(name).render(values) + "\n"


def _points(rows: list[Row], key: str) -> list[tuple[float, float]]:
    found = ((row["step"], row.get(key)) for row in rows)
    return [(x, y) for x, y in found if isinstance(y, int | float) and math.isfinite(y)]


def _keys(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(key for row in rows for key in row))


def _curves(
    training: list[Row], evaluations: list[Row], figures: Sequence[str]
) -> Iterator[Chart | None]:
    def curve(title: str, label: str, key: str) -> Chart | None:
        return line_chart(title, {label: _points(training, key)})

    own = [key for key in _keys(training) if key not in _KNOWN and "/" not in key]
    yield line_chart("Loss", {key: _points(training, key) for key in own if "loss" in key})
    for metric in figures:
        keys = [key for key in _keys(evaluations) if key.endswith(f"/{metric}")]
        series = {key.removesuffix(f"/{metric}"): _points(evaluations, key) for key in keys}
        yield line_chart(metric, series)
    yield curve("R@1 within the batch", "R@1", "batch_R@1")
    yield curve("Learning rate", "lr", "lr")
    yield from (curve(key, key, key) for key in own if "loss" not in key)
    yield curve("Samples a second", "last", "samples_per_second")
    yield curve("Waiting for data, share of a step", "last", "data_wait")


def _tiles(training: list[Row], last: Row, headlines: Sequence[str]) -> list[tuple[str, str]]:
    tiles: list[tuple[str, str]] = []
    if training:
        tiles.append(("steps", f"{training[-1]['step']:,}"))
        tiles.append(("time", duration(_seconds(training))))
        if losses := _points(training, "loss"):
            tiles.append(("last loss", label(losses[-1][1])))
        if speeds := [y for _, y in _points(training, "samples_per_second")]:
            tiles.append(("samples a second, median", label(median(speeds))))
    endings = tuple(f"/{name}" for name in headlines)
    for key, value in last.items():
        if key.endswith(endings) and "/shuffled_words/" not in key:
            tiles.append((key.replace("/", " "), number(value)))
    return tiles


def _seconds(training: list[Row]) -> float:
    """Time spent over all starts of the run: each start counts its seconds from 0."""
    total = before = 0.0
    for row in training:
        now = row.get("seconds") or 0.0
        total += now - before if now >= before else now
        before = now
    return total
