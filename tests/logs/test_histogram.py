"""Histograms as inline SVG."""

import re
from xml.etree import ElementTree

from engine.logs.histogram import histogram


def _figure(series, unit="pixels"):
    return ElementTree.fromstring(histogram("Width <of all>", series, unit))


def _heights(figure):
    """The heights of each outline's bins, in pixels above the axis."""
    found = []
    for path in figure.iter("path"):
        if path.get("class").startswith("line"):
            downs = [float(y) for y in re.findall(r"V([\d.]+) H", path.get("d"))]
            found.append([196 - y for y in downs])
    return found


def test_bins_have_the_shares_of_their_values():
    (heights,) = _heights(_figure({"mine": {1: 10, 2: 30, 3: 0, 4: 10}}))
    assert len(heights) == 4
    assert heights[1] == 3 * heights[0] == 3 * heights[3] > 0 and heights[2] == 0


def test_series_are_drawn_on_one_scale():
    figure = _figure({"a": {10: 1}, "b": {10: 50, 20: 50}, "empty": {}})
    first, second = _heights(figure)
    assert first[0] == 2 * second[0] and len(first) == len(second) == 11
    assert [span.text for span in figure.iter("span")] == ["a", "b"]


def test_far_values_share_the_last_bin():
    counts = dict.fromkeys(range(100), 10) | {1_000_000: 2}
    (heights,) = _heights(_figure({"mine": counts}))
    assert len(heights) <= 40 and max(heights) < 2.5 * min(heights)


def test_nothing_to_draw():
    assert histogram("Width", {"mine": {}}, "pixels") == ""
