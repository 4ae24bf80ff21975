"""CLIPScore arithmetic by hand and against a loop."""

import numpy as np
import pytest

from engine.metrics import clipscore


def clip_score(image, text):
    return clipscore.WEIGHT * np.maximum(clipscore.cosines(image, text), 0)


def ref_clip_score(image, text, references):
    return clipscore.ref_clip_score(clip_score(image, text), text, references)


def unit(degrees):
    angle = np.radians(degrees)
    return np.array([np.cos(angle), np.sin(angle)])


def test_by_hand():
    image = np.stack([unit(0), unit(0)])
    text = np.stack([3 * unit(60), unit(120)])  # lengths do not count
    assert clipscore.cosines(image, text) == pytest.approx([0.5, -0.5])
    assert clip_score(image, text) == pytest.approx([1.25, 0])
    references = [np.stack([unit(90), unit(60)]), np.stack([unit(120)])]
    scores = ref_clip_score(image, text, references)
    assert scores == pytest.approx([2 * 1.25 * 1 / 2.25, 0])
    means = clipscore.clip_scores(image, text, references)
    assert means == pytest.approx(
        {"CLIPScore": 0.625, "CLIP_cosine": 0, "RefCLIPScore": 1.25 / 2.25}
    )
    assert set(clipscore.clip_scores(image, text)) == {"CLIPScore", "CLIP_cosine"}


def test_equals_a_loop():
    draw = np.random.default_rng(0)
    image, text = draw.normal(size=(20, 4)), draw.normal(size=(20, 4))
    references = [draw.normal(size=(draw.integers(1, 6), 4)) for _ in image]
    wanted = []
    for i, t, several in zip(image, text, references, strict=True):
        cosine = i @ t / np.linalg.norm(i) / np.linalg.norm(t)
        score = 2.5 * max(cosine, 0)
        near = max(max(r @ t / np.linalg.norm(r) / np.linalg.norm(t) for r in several), 0)
        wanted.append(2 * score * near / (score + near) if score + near else 0)
    assert ref_clip_score(image, text, references) == pytest.approx(wanted)


def test_references_that_point_away_count_as_zero():
    image, text = unit(0)[None], unit(0)[None]
    assert ref_clip_score(image, text, [unit(180)[None]]) == [0]


def test_empty_features_have_no_likeness():
    zero = np.zeros((1, 2))
    assert clip_score(zero, unit(0)[None]) == [0]
    assert ref_clip_score(zero, zero, [zero]) == [0]


@pytest.mark.parametrize(
    ("image", "text", "message"),
    [
        (np.ones((2, 3)), np.ones((1, 3)), "images are"),
        (np.ones((1, 2)), np.ones((1, 3)), "images are"),
        (np.ones(3), np.ones((1, 3)), "shape"),
        (np.array([[1.0], [np.nan]]), np.ones((2, 1)), "row 1"),
        (np.ones((0, 3)), np.ones((0, 3)), "at least one"),
    ],
)
def test_wrong_shapes(image, text, message):
    with pytest.raises(ValueError, match=message):
        clipscore.clip_scores(image, text)


def test_each_text_needs_references():
    one = np.ones((1, 3))
    with pytest.raises(ValueError, match="references of 2"):
        ref_clip_score(one, one, [one, one])
    with pytest.raises(ValueError, match="text 0 has no reference"):
        ref_clip_score(one, one, [np.ones((0, 3))])
