"""A histogram as a picture: bars where the values are, and what it does not take."""

import numpy as np
import pytest

from engine.logs.histogram_png import draw

BLUE, RED = (59, 111, 212), (217, 104, 60)


def outlined(image, colour):
    """Columns of the plot that a series' line or area runs through, of its upper part."""
    pixels = np.asarray(image)[80:200].astype(int)
    return np.flatnonzero((np.abs(pixels - colour).sum(-1) < 40).any(0))


def test_each_series_stands_where_its_values_are():
    image = draw("a title", {"low": [0.0] * 9, "high": [1.0] * 3, "none": []}, "score")
    assert image.size == (920, 480)
    low, high = outlined(image, BLUE), outlined(image, RED)
    assert low.max() < 110 and high.min() > 860
    assert low.min() >= 74 and high.max() <= 893


def test_values_that_are_no_numbers_are_left_out():
    assert (
        draw("t", {"a": [0.5, np.nan, np.inf]}, "u").tobytes()
        == draw("t", {"a": [0.5]}, "u").tobytes()
    )


@pytest.mark.parametrize("series", [{}, {"a": []}, {"a": [np.nan]}, {c: [1.0] for c in "abcde"}])
def test_what_cannot_be_drawn(series):
    with pytest.raises(ValueError, match="1 to 4 series"):
        draw("t", series, "u")
