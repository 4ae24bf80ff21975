"""Charts by matplotlib: SVG in the colours of the page's style sheet, and pictures for files.

matplotlib is imported with the first chart: reports and files of figures alone need it.
"""

from __future__ import annotations

import io
import logging
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Points = Sequence[tuple[float, float]]  # (x, y), x rising

NUM_COLOURS = 6
# Stand-ins in an SVG for the style sheet's colours, which differ by day and by night. None is
# black, which matplotlib does not write.
COLOURS = [f"#0001{place:02x}" for place in range(NUM_COLOURS)]
_SOFT, _RULE = "#0001f0", "#0001f1"
_PAGE = {colour: f"var(--c{place})" for place, colour in enumerate(COLOURS)}
_PAGE |= {_SOFT: "var(--soft)", _RULE: "var(--rule)"}
_BUCKETS = 240  # more points than pixels make a file large, not a chart better
_MAX_DOTS = 40  # points of a line that are marked one by one
# of pictures, which have one background
_INK, _GREY, _LIGHT = "#1c1d22", "#6b6f7b", "#e6e6e3"
_LINES = ("#3b6fd4", "#d9683c", "#2e9c76", "#9257c4")
_BINS = 40
_LEVELS = (0.2, 0.4, 0.6, 0.8)  # of F1


@dataclass(frozen=True)
class Chart:
    """A figure of a page: its title, its lines by name with their last value, and the SVG."""

    title: str
    legend: list[tuple[str, str]]
    svg: str


def line_chart(title: str, series: Mapping[str, Points]) -> Chart | None:
    """One line a series: bucket means, and the spread of each bucket behind them.

    Series without a point are left out; None where none has any. Where none has two there is no
    SVG: the legend's values say all.
    """
    series = {name: list(points) for name, points in series.items() if points}
    if not series:
        return None
    notes: dict[str, str] = {}  # of the dots, shown where the pointer rests

    def draw(axes: Axes) -> None:
        for number, points in enumerate(series.values()):
            groups, colour = buckets(points), COLOURS[number % NUM_COLOURS]
            x_N = [x for x, _ in groups]
            axes.plot(x_N, [sum(ys) / len(ys) for _, ys in groups], color=colour, clip_on=False)
            if len(points) > len(groups):
                low_N, high_N = ([f(ys) for _, ys in groups] for f in (min, max))
                axes.fill_between(x_N, low_N, high_N, color=colour, alpha=0.18, lw=0, clip_on=False)
            for x, y in points if len(points) <= _MAX_DOTS else ():
                dot = f"dot-{number}-{len(notes)}"
                notes[dot] = f"step {label(x)}: {label(y)}"
                axes.plot(x, y, "o", ms=3.5, color=colour, gid=dot, clip_on=False)
        every_x = [x for points in series.values() for x, _ in points]
        if min(every_x) < max(every_x):
            axes.set_xlim(min(every_x), max(every_x))

    drawn = svg(draw) if any(len(points) > 1 for points in series.values()) else ""
    for dot, note in notes.items():
        drawn = drawn.replace(f'<g id="{dot}">', f"<g><title>{note}</title>")
    return Chart(title, [(name, label(points[-1][1])) for name, points in series.items()], drawn)


def buckets(points: Points, num_buckets: int = _BUCKETS) -> list[tuple[float, list[float]]]:
    """Neighbouring points put together: (mean x, ys) of at most ``num_buckets`` groups."""
    size = math.ceil(len(points) / num_buckets)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(x for x, _ in group) / len(group), [y for _, y in group]) for group in groups]


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


def svg(draw: Callable[[Axes], None]) -> str:
    """The SVG of what ``draw`` puts on the axes, in ``COLOURS``; without clips and metadata."""
    with _matplotlib({"axes.autolimit_mode": "round_numbers"}) as new_figure:
        figure = new_figure((4.6, 2.2))
        figure.subplots_adjust(left=0.105, right=0.965, top=0.95, bottom=0.115)
        axes = figure.add_subplot(frame_on=False)
        _style(axes, _SOFT, _RULE, "y")
        draw(axes)
        out = io.StringIO()
        without = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(out, format="svg", transparent=True, metadata=without)
    text = re.sub("font-family: [^;]*; ", "", out.getvalue())  # the page's own
    text = re.sub(r"(\.\d\d)\d+(?=[ \n])", r"\1", text)  # hundredths of a point, in paths
    for drawn, wanted in _PAGE.items():
        text = text.replace(drawn, wanted)
    return text[text.index("<svg") :]


def histogram(title: str, series: Mapping[str, Sequence[float]], unit: str) -> Image.Image:
    """A picture of the share of each series' values in each of 40 bins; a dashed line at its mean.

    Values that are not finite are left out. Raises ValueError where there are none, or for more
    series than there are colours.
    """
    values = {name: np.asarray(given, dtype=np.float64) for name, given in series.items()}
    values = {name: kept for name, v in values.items() if len(kept := v[np.isfinite(v)])}

    def draw(axes: Axes) -> None:
        edges = np.histogram_bin_edges(np.concatenate(list(values.values())), _BINS)
        for colour, (name, value_N) in zip(_LINES, values.items(), strict=False):
            share_B = 100 * np.histogram(value_N, edges)[0] / len(value_N)
            note = f"{name}: {len(value_N):,}, mean {label(float(value_N.mean()))}"
            axes.stairs(share_B, edges, fill=True, color=colour, alpha=0.25)
            axes.stairs(share_B, edges, color=colour, lw=2, label=note)
            axes.axvline(float(value_N.mean()), color=colour, ls="--", lw=2)
        axes.set(xlabel=unit, ylim=(0, None))
        axes.yaxis.set_major_formatter("{x:g} %")
        axes.grid(visible=False, axis="x")

    return _picture(title, (920, 480), draw, len(values), "series")


def precision_recall(
    title: str, curves: Mapping[str, tuple[Sequence[float], Sequence[float]]]
) -> Image.Image:
    """A picture of lines of (recalls, precisions), 0 … 1, with the best F1 of each.

    Thin lines are of equal F1. Raises ValueError for no curve, or for more than there are colours.
    """

    def draw(axes: Axes) -> None:
        for level in _LEVELS:
            recall_N = np.linspace(level / (2 - level), 1, 60)
            axes.plot(recall_N, level * recall_N / (2 * recall_N - level), color="#cfd0d4", lw=1)
            axes.annotate(f"F1 {level:g}", (1, level / (2 - level)), (-3, 3), color=_GREY,
                          textcoords="offset points", ha="right")  # fmt: skip
        for colour, (name, (recalls, precisions)) in zip(_LINES, curves.items(), strict=False):
            points = list(zip(recalls, precisions, strict=True))
            recall, precision = max(points, key=_f1)
            f1 = _f1((recall, precision))
            axes.plot(recalls, precisions, color=colour, lw=3, label=f"{name}: best F1 {f1:.3f}")
            axes.plot(recall, precision, "o", ms=9, color=colour, mec="white", mew=2)
        axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="recall", ylabel="precision")

    return _picture(title, (640, 640), draw, len(curves), "curves")


def _f1(point: tuple[float, float]) -> float:
    recall, precision = point
    return 2 * recall * precision / (recall + precision) if recall + precision else 0.0


def _picture(
    title: str, size: tuple[int, int], draw: Callable[[Axes], None], number: int, unit: str
) -> Image.Image:
    if not 0 < number <= len(_LINES):
        raise ValueError(f"a picture takes 1 to {len(_LINES)} {unit}, not {number}")
    with _matplotlib({"font.size": 11}) as new_figure:
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        figure = new_figure((size[0] / 100, size[1] / 100), dpi=100, layout="constrained")
        canvas = FigureCanvasAgg(figure)
        figure.get_layout_engine().set(w_pad=0.15, h_pad=0.12)
        axes = figure.add_subplot(frame_on=False)
        axes.set_title(title, loc="left", pad=26, fontsize=14, color=_INK, parse_math=False)
        _style(axes, _GREY, _LIGHT, "both")
        draw(axes)
        for text in (axes.xaxis.label, axes.yaxis.label):
            text.set(color=_GREY, parse_math=False)
        legend = axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 1), ncols=4, frameon=False)
        for text in legend.get_texts():
            text.set(color=_INK, parse_math=False)
        canvas.draw()
        return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])


def _style(axes: Axes, soft: str, rule: str, grid: Literal["y", "both"]) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.tick_params(length=0, labelcolor=soft)
    axes.grid(axis=grid, color=rule, clip_on=False)
    axes.set_axisbelow(True)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        axis.set_major_formatter(lambda value, _: label(value))


@contextmanager
def _matplotlib(settings: dict[str, Any]) -> Iterator[Callable[..., Any]]:
    """Its class ``Figure``, with these settings and no user's; nothing is written to stderr."""
    # such as that it builds its font cache, or that its own folder cannot be written
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    from matplotlib import style
    from matplotlib.figure import Figure

    ours = {"svg.fonttype": "none", "svg.hashsalt": "", "font.size": 8, "axes.xmargin": 0,
            "axes.ymargin": 0}  # fmt: skip
    with style.context(["default", ours | settings]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # of a dataset's name
        yield Figure
