"""Histograms as inline SVG, in the style of the line charts."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

from engine.logs.charts import NUM_COLOURS, label, ticks

Counts = Mapping[int, int]  # value: how often it occurs

_WIDTH, _HEIGHT = 460, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 18, 10, 24
_BINS = 40


def histogram(title: str, series: Mapping[str, Counts], unit: str) -> str:
    """A figure with the share of each bin, an outline a series; an empty string without values.

    The last bin holds the highest hundredth too where that lies far above the others.
    """
    series = {name: counts for name, counts in series.items() if counts}
    if not series:
        return ""
    low = min(min(counts) for counts in series.values())
    bound = max(_quantile(counts, 0.995) for counts in series.values())
    width = max(1, -(-(bound + 1 - low) // _BINS))
    number = (bound - low) // width + 1
    shares = {name: _shares(counts, low, width, number) for name, counts in series.items()}
    y_ticks = ticks(0, max(max(each) for each in shares.values()))
    high = low + number * width

    def across(value: float) -> float:
        return _LEFT + (value - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT)

    def down(share: float) -> float:
        return _HEIGHT - _BOTTOM - share / y_ticks[-1] * (_HEIGHT - _TOP - _BOTTOM)

    parts = []
    for y in y_ticks:
        grid = f"M{_LEFT},{down(y):.1f} H{_WIDTH - _RIGHT}"
        parts.append(f'<path class="grid" d="{grid}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{down(y) + 4:.1f}" class="y">{label(y)} %</text>')
    parts += [
        f'<text x="{across(x):.1f}" y="{_HEIGHT - 6}" class="x">{label(x)}</text>'
        for x in ticks(low, high)
        if low <= x <= high
    ]
    for index, each in enumerate(shares.values()):
        steps = " ".join(
            f"V{down(share):.1f} H{across(low + (place + 1) * width):.1f}"
            for place, share in enumerate(each)
        )
        path = f"M{_LEFT},{down(0):.1f} {steps} V{down(0):.1f}"
        colour = f"c{index % NUM_COLOURS}"
        parts.append(f'<path class="band {colour}" d="{path}Z"/>')
        parts.append(f'<path class="line {colour}" d="{path}"/>')
    legend = "".join(
        f'<span class="c{index % NUM_COLOURS}">{escape(name)}</span>'
        for index, name in enumerate(shares)
    )
    return (
        f"<figure><figcaption>{escape(title)}, {escape(unit)}<div>{legend}</div></figcaption>"
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">'
        f"{''.join(parts)}</svg></figure>"
    )


def _shares(counts: Counts, low: int, width: int, number: int) -> list[float]:
    """Per cent of the values in each bin, those above the last one in it."""
    bins = [0] * number
    for value, times in counts.items():
        bins[min((value - low) // width, number - 1)] += times
    return [100 * times / sum(bins) for times in bins]


def _quantile(counts: Counts, share: float) -> int:
    wanted, seen = share * sum(counts.values()), 0
    for value in sorted(counts):
        seen += counts[value]
        if seen >= wanted:
            return value
    return max(counts)
