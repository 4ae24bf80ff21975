"""Histograms as inline SVG."""

from xml.etree import ElementTree

import pytest

from engine.tools.inspect.report import bins, histogram

NAMESPACE = "http://www.w3.org/2000/svg"


def test_bins_have_the_shares_of_their_values():
    edges, (shares,) = bins([{1: 10, 2: 30, 3: 0, 4: 10}])
    assert edges == [1, 2, 3, 4, 5] and shares == [20, 60, 0, 20]


def test_series_share_their_bins():
    edges, (first, second) = bins([{10: 1}, {10: 50, 20: 50}])
    assert edges == list(range(10, 22))
    assert first == [100] + [0] * 10 and second == [50] + [0] * 9 + [50]


def test_far_values_share_the_last_bin():
    edges, (shares,) = bins([dict.fromkeys(range(100), 10) | {1_000_000: 2}])
    assert edges == list(range(0, 103, 3))
    assert shares == [pytest.approx(100 * 30 / 1002)] * 33 + [pytest.approx(100 * 12 / 1002)]


def test_the_drawing_stands_alone_in_the_pages_colours():
    svg = histogram([{10: 1}, {10: 50, 20: 50}])
    assert svg.startswith("<svg") and "url(" not in svg and "<defs" not in svg.partition("<g")[2]
    texts = {text.text for text in ElementTree.fromstring(svg).iter(f"{{{NAMESPACE}}}text")}
    assert {"10", "20", "0 %", "100 %"} <= texts
    assert "var(--c0)" in svg and "var(--c1)" in svg and "var(--c2)" not in svg
    assert "fill: var(--c0)" in svg and "var(--soft)" in svg and "var(--rule)" in svg
    assert "#000" not in svg
