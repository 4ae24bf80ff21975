"""A histogram as a picture: shares of scores, an outline a series."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from engine.logs.charts import label, ticks

_WIDTH, _HEIGHT = 920, 480
_LEFT, _RIGHT, _TOP, _BOTTOM = 74, 28, 70, 62
_BINS = 40
_INK, _SOFT, _RULE = "#1c1d22", "#6b6f7b", "#e6e6e3"
_COLOURS = ((59, 111, 212), (217, 104, 60), (46, 156, 118), (146, 87, 196))
_SHADE = 64  # of 255: an area's opacity


def draw(title: str, series: Mapping[str, Sequence[float]], unit: str) -> Image.Image:
    """The share of each series' values in each of 40 bins; a dashed line at its mean.

    Values that are not finite are left out. Raises ValueError where there are none, or for more
    series than there are colours.
    """
    values = {name: np.asarray(given, dtype=np.float64) for name, given in series.items()}
    values = {name: kept for name, v in values.items() if len(kept := v[np.isfinite(v)])}
    if not values or len(values) > len(_COLOURS):
        raise ValueError(f"a histogram takes 1 to {len(_COLOURS)} series, not {len(values)}")
    x_ticks = ticks(min(v.min() for v in values.values()), max(v.max() for v in values.values()))
    edges = np.linspace(x_ticks[0], x_ticks[-1], _BINS + 1)
    shares = {name: 100 * np.histogram(v, edges)[0] / len(v) for name, v in values.items()}
    y_ticks = ticks(0, max(share.max() for share in shares.values()))

    def across(value: float) -> float:
        return _LEFT + (value - edges[0]) / (edges[-1] - edges[0]) * (_WIDTH - _LEFT - _RIGHT)

    def down(share: float) -> float:
        return _HEIGHT - _BOTTOM - share / y_ticks[-1] * (_HEIGHT - _TOP - _BOTTOM)

    image = Image.new("RGB", (_WIDTH, _HEIGHT), "white")
    pen = ImageDraw.Draw(image, "RGBA")
    small, large = ImageFont.load_default(15), ImageFont.load_default(19)
    for y in y_ticks:
        pen.line((_LEFT, down(y), _WIDTH - _RIGHT, down(y)), _RULE)
        pen.text((_LEFT - 8, down(y)), f"{label(y)} %", _SOFT, small, anchor="rm")
    for x in x_ticks:
        pen.text((across(x), _HEIGHT - _BOTTOM + 8), label(x), _SOFT, small, anchor="ma")
    pen.text((_LEFT, 14), title, _INK, large)
    pen.text(((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 10), unit, _SOFT, small, anchor="ms")
    left: float = _LEFT
    for colour, (name, share) in zip(_COLOURS, shares.items(), strict=False):
        steps = [(across(e), down(s)) for (a, b), s in zip(pairwise(edges), share, strict=True)
                 for e in (a, b)]  # fmt: skip
        pen.polygon([(steps[0][0], down(0)), *steps, (steps[-1][0], down(0))], (*colour, _SHADE))
        pen.line(steps, colour, 2)
        mean = values[name].mean()
        for y in range(_TOP, _HEIGHT - _BOTTOM, 10):
            pen.line((across(mean), y, across(mean), y + 5), colour, 2)
        told = f"{name}: {len(values[name]):,}, mean {label(float(mean))}"
        pen.rectangle((left, 46, left + 11, 57), colour)
        pen.text((left + 17, 52), told, _INK, small, anchor="lm")
        left += 17 + pen.textlength(told, small) + 26
    return image
