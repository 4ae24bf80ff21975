"""Charts: SVG in the page's colours, and pictures."""

import os
import re
import subprocess
import sys
from xml.etree import ElementTree

import numpy as np
import pytest

from engine.logs.charts import (
    COLOURS,
    buckets,
    histogram,
    label,
    line_chart,
    precision_recall,
)

BLUE, RED = (59, 111, 212), (217, 104, 60)
SVG = "{http://www.w3.org/2000/svg}"


def paths(chart, colour):
    """Coordinates [N, 2] of each path that has a colour of the page."""
    return [
        np.array(re.findall(r"(-?[\d.]+) (-?[\d.]+)", path.get("d")), float)
        for path in ElementTree.fromstring(chart.svg).iter(f"{SVG}path")
        if f"stroke: var(--c{colour})" in path.get("style", "")
    ]


def test_buckets_keep_every_point():
    points = [(float(i), float(i % 7)) for i in range(1001)]
    groups = buckets(points, 100)
    assert len(groups) <= 100
    assert sum(len(ys) for _, ys in groups) == 1001
    assert buckets(points[:3], 100) == [(0.0, [0.0]), (1.0, [1.0]), (2.0, [2.0])]


def test_lines_run_where_their_points_are():
    chart = line_chart("t", {"a": [(1, 5.0), (2, -3.0)], "none": [], "b": [(1.5, 2.0)]})
    assert (chart.title, chart.legend) == ("t", [("a", "-3"), ("b", "2")])
    line = max(paths(chart, 0), key=np.ptp)
    (left, high), (right, low) = line
    assert 0 < left < right < 331.2 and 0 < high < low < 158.4
    assert line_chart("t", {"a": []}) is None


def test_few_points_are_dots_with_their_values():
    chart = line_chart("t", {"a": [(1, 0.5), (2, 12345.0)], "b": [(2, 3e-5)]})
    titles = re.findall("<g><title>(.*?)</title>", chart.svg)
    assert titles == ["step 1: 0.5", "step 2: 12.35k", "step 2: 3.0e-5"]
    assert "<title>" not in line_chart("t", {"a": [(n, n) for n in range(41)]}).svg


def test_single_values_are_in_the_legend_alone():
    chart = line_chart("t", {"a": [(1, 0.5)], "none": [], "b": [(1, 3e-5)]})
    assert (chart.legend, chart.svg) == ([("a", "0.5"), ("b", "3.0e-5")], "")


def test_many_points_are_means_with_their_spread():
    steps = [(n, float(n % 2)) for n in range(1, 2001)]
    chart = line_chart("t", {"a": steps, "b": [(n, 0.5) for n in range(1, 2001)]})
    (line,) = (path for path in paths(chart, 0) if len(path) > 1)
    assert len(line) <= 240 and 0 < line[:, 1].min() < line[:, 1].max() < 158.4
    assert len(chart.svg) < 30_000
    texts = {text.text for text in ElementTree.fromstring(chart.svg).iter(f"{SVG}text")}
    assert {"0", "0.2", "1", "500", "2000"} <= texts
    assert "fill: var(--c0); fill-opacity: 0.18" in chart.svg


def test_an_svg_has_the_pages_colours_alone():
    series = {name: [(n, n + place) for n in range(3)] for place, name in enumerate("abcdefg")}
    svg = line_chart("t", series).svg
    assert all(f"var(--c{place})" in svg for place in range(6))
    assert not any(colour in svg for colour in COLOURS)
    assert not re.search("#0|url|font-family|metadata", svg.replace("#m", "m"))
    assert svg == line_chart("t", series).svg


@pytest.mark.parametrize("low", [0.0, 1e-12, -7e9, 3.3])
@pytest.mark.parametrize("width", [0.0, 1e-6, 1.0, 1e12])
def test_values_of_any_size_are_drawn(low, width):
    chart = line_chart("t", {"a": [(1, low), (1, low + width)]})
    ElementTree.fromstring(chart.svg)
    assert "nan" not in chart.svg


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (1234567, "1.235M"), (25000, "25k"), (12.5, "12.5"),
                        (3e-5, "3.0e-5"), (-0.25, "-0.25")],
)  # fmt: skip
def test_labels_are_short(value, text):
    assert label(value) == text


def outlined(image, colour):
    """Columns that a series' line runs through, in the upper part of the plot."""
    pixels = np.asarray(image)[90:220].astype(int)
    return np.flatnonzero((np.abs(pixels - colour).sum(-1) < 40).any(0))


def test_each_series_stands_where_its_values_are():
    image = histogram("a title", {"low": [0.0] * 9, "high": [1.0] * 3, "none": []}, "score")
    assert image.size == (920, 480) and image.mode == "RGB"
    low, high = outlined(image, BLUE), outlined(image, RED)
    assert low.min() > 40 and low.max() < 120 and high.min() > 860


def test_values_that_are_not_finite_are_left_out():
    whole = histogram("t", {"a": [0.5]}, "u")
    assert histogram("t", {"a": [0.5, np.nan, np.inf]}, "u").tobytes() == whole.tobytes()


@pytest.mark.parametrize("series", [{}, {"a": []}, {"a": [np.nan]}, {c: [1.0] for c in "abcde"}])
def test_what_cannot_be_drawn(series):
    with pytest.raises(ValueError, match="1 to 4 series"):
        histogram("t", series, "u")


def test_a_curve_has_a_dot_at_its_best_f1():
    image = precision_recall("t", {"a": ([0.1, 0.5, 0.9], [1.0, 0.5, 0.1])})
    assert image.size == (640, 640)
    # the plot's middle, where both are 0.5: a white rim around a blue dot
    found = np.argwhere(np.abs(np.asarray(image)[100:].astype(int) - BLUE).sum(-1) < 20)
    middle = found[np.abs(found[:, 1] - (60 + 570 / 2)) < 8]
    assert 200 < middle[:, 0].mean() < 320
    with pytest.raises(ValueError, match="1 to 4 curves, not 0"):
        precision_recall("t", {})


def test_names_are_text_and_nothing_is_written_on_the_terminal(tmp_path):
    code = (
        "from engine.logs.charts import histogram, line_chart;"
        "histogram('$x$ \\\\frac{ 日本', {'$y_': [1.0]}, '$z$');"
        "line_chart('t', {'a': [(1, 2), (2, 3)]})"
    )
    # the first use of all: with no font cache, and no folder to write one
    environment = os.environ | {"MPLCONFIGDIR": str(tmp_path / "none" / "there"), "DISPLAY": ""}
    (tmp_path / "none").write_text("")
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_matplotlib_and_jinja_are_imported_with_the_first_page_alone():
    code = (
        "import sys, engine.logs.report, engine.logs.run_log;"
        "print([name for name in ('matplotlib', 'jinja2') if name in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "[]\n"
