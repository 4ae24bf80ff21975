"""A precision-recall curve as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont

from engine.logs.charts import label

_SIDE, _LEFT, _RIGHT, _TOP, _BOTTOM = 640, 74, 28, 78, 62
_INK, _SOFT, _RULE = "#1c1d22", "#6b6f7b", "#e6e6e3"
_COLOURS = ((59, 111, 212), (217, 104, 60), (46, 156, 118), (146, 87, 196))
_TICKS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
_LEVELS = (0.2, 0.4, 0.6, 0.8)  # of F1


def draw(title: str, curves: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> Image.Image:
    """Lines of (recall, precision), both 0 … 1, with the best F1 of each; thin lines of equal F1.

    Raises ValueError for none, or for more curves than there are colours.
    """
    if not 0 < len(curves) <= len(_COLOURS):
        raise ValueError(f"a picture takes 1 to {len(_COLOURS)} curves, not {len(curves)}")
    image = Image.new("RGB", (_SIDE, _SIDE), "white")
    pen = ImageDraw.Draw(image)
    small, large = ImageFont.load_default(15), ImageFont.load_default(19)

    def at(recall: float, precision: float) -> tuple[float, float]:
        wide, high = _SIDE - _LEFT - _RIGHT, _SIDE - _TOP - _BOTTOM
        return _LEFT + recall * wide, _SIDE - _BOTTOM - precision * high

    for tick in _TICKS:
        pen.line((at(0, tick), at(1, tick)), _RULE)
        pen.line((at(tick, 0), at(tick, 1)), _RULE)
        pen.text((_LEFT - 8, at(0, tick)[1]), label(tick), _SOFT, small, anchor="rm")
        pen.text((at(tick, 0)[0], _SIDE - _BOTTOM + 8), label(tick), _SOFT, small, anchor="ma")
    for level in _LEVELS:
        least = level / (2 - level)  # recall at precision 1
        steps = [least + (1 - least) * step / 60 for step in range(61)]
        pen.line([at(r, level * r / (2 * r - level)) for r in steps], "#cfd0d4")
        right, low = at(1, least)
        pen.text((right - 3, low - 5), f"F1 {level:g}", _SOFT, small, anchor="rs")
    pen.text((_LEFT, 14), title, _INK, large)
    pen.text((_SIDE / 2, _SIDE - 12), "recall", _SOFT, small, anchor="ms")
    pen.text((_LEFT - 8, _TOP - 8), "precision", _SOFT, small, anchor="ms")
    left: float = _LEFT
    for colour, (name, (recalls, precisions)) in zip(_COLOURS, curves.items(), strict=False):
        points = list(zip(recalls, precisions, strict=True))
        pen.line([at(*point) for point in points], colour, 3, joint="curve")
        best = max(points, key=lambda point: _f1(*point))
        x, y = at(*best)
        pen.ellipse((x - 5, y - 5, x + 5, y + 5), colour, "white", 2)
        told = f"{name}: best F1 {_f1(*best):.3f}"
        pen.rectangle((left, 44, left + 11, 55), colour)
        pen.text((left + 17, 50), told, _INK, small, anchor="lm")
        left += 17 + pen.textlength(told, small) + 26
    return image


def _f1(recall: float, precision: float) -> float:
    return 2 * recall * precision / (recall + precision) if recall + precision else 0.0
