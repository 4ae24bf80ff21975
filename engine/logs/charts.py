"""Line charts as inline SVG: no script, no network, colours from the page's style sheet."""

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

Points = Sequence[tuple[float, float]]  # (x, y), x rising

_WIDTH, _HEIGHT = 460, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 18, 10, 24
_BUCKETS = 240  # more points than pixels make a file large, not a chart better
NUM_COLOURS = 6


def line_chart(title: str, series: Mapping[str, Points]) -> str:
    """A figure with one line a series: bucket means, and the spread of each bucket behind them.

    Series without a point are left out; an empty string where none has any.
    """
    series = {name: list(points) for name, points in series.items() if points}
    if not series:
        return ""
    every = [point for points in series.values() for point in points]
    x_ticks = ticks(min(x for x, _ in every), max(x for x, _ in every))
    y_ticks = ticks(min(y for _, y in every), max(y for _, y in every))

    x_low, x_high = min(x for x, _ in every), max(x for x, _ in every)
    y_low = min(y_ticks[0], min(y for _, y in every))
    y_high = max(y_ticks[-1], max(y for _, y in every))

    def at(x: float, y: float) -> str:
        across = (x - x_low) / (x_high - x_low or 1)
        up = (y - y_low) / (y_high - y_low or 1)
        left = _LEFT + across * (_WIDTH - _LEFT - _RIGHT)
        return f"{left:.1f},{_HEIGHT - _BOTTOM - up * (_HEIGHT - _TOP - _BOTTOM):.1f}"

    parts = []
    for y in y_ticks:
        left, top = at(x_low, y).split(",")
        parts.append(f'<path class="grid" d="M{at(x_low, y)} L{at(x_high, y)}"/>')
        parts.append(
            f'<text x="{float(left) - 6}" y="{float(top) + 4}" class="y">{label(y)}</text>'
        )
    for x in (x for x in x_ticks if x_low <= x <= x_high):
        left = at(x, y_low).split(",")[0]
        parts.append(f'<text x="{left}" y="{_HEIGHT - 6}" class="x">{label(x)}</text>')
    for index, points in enumerate(series.values()):
        parts.append(_line(points, at, index % NUM_COLOURS))
    legend = "".join(
        f'<span class="c{index % NUM_COLOURS}">{escape(name)} <b>{label(points[-1][1])}</b></span>'
        for index, (name, points) in enumerate(series.items())
    )
    return (
        f"<figure><figcaption>{escape(title)}<div>{legend}</div></figcaption>"
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">'
        f"{''.join(parts)}</svg></figure>"
    )


def _line(points: Points, at: Callable[[float, float], str], colour: int) -> str:
    groups = buckets(points)
    mean = [(x, sum(ys) / len(ys)) for x, ys in groups]
    line = " ".join(at(x, y) for x, y in mean)
    drawn = f'<polyline class="line c{colour}" points="{line}"/>'
    if len(points) > len(groups):
        high = [at(x, max(ys)) for x, ys in groups]
        low = [at(x, min(ys)) for x, ys in reversed(groups)]
        drawn = f'<polygon class="band c{colour}" points="{" ".join(high + low)}"/>' + drawn
    if len(points) <= 40:
        for x, y in mean:
            left, top = at(x, y).split(",")
            drawn += (
                f'<circle class="dot c{colour}" cx="{left}" cy="{top}" r="3">'
                f"<title>step {label(x)}: {label(y)}</title></circle>"
            )
    return drawn


def buckets(points: Points, num_buckets: int = _BUCKETS) -> list[tuple[float, list[float]]]:
    """Neighbouring points put together: (mean x, ys) of at most ``num_buckets`` groups."""
    size = math.ceil(len(points) / num_buckets)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(x for x, _ in group) / len(group), [y for _, y in group]) for group in groups]


def ticks(low: float, high: float, aim: int = 4) -> list[float]:
    """Round numbers that span [low, high], about ``aim`` steps of 1, 2, 2.5 or 5 × 10ⁿ."""
    if high - low <= 1e-12 * max(abs(low), abs(high)):
        spread = abs(low) or 1.0
        low, high = low - spread / 2, high + spread / 2
    rough = (high - low) / aim
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * (1 - 1e-9))
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [n * step for n in range(first, last + 1)]


def label(value: float) -> str:
    """A figure in few characters: 1.2M, 250k, 12.5, 3e-05."""
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:.4g}M"
    if size >= 1e4:
        return f"{value / 1e3:.4g}k"
    if size == 0 or size >= 1e-3:
        return f"{value:.4g}"
    return f"{value:.1e}".replace("e-0", "e-")
