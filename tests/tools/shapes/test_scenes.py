"""The built-in dataset: what its captions say, what its images show, and what is held out.

Captions are parsed and images measured independently of the code that made them.
"""

import itertools

import numpy as np
import pytest
from PIL import Image

from engine.tools.shapes import folder as drawn
from engine.tools.shapes.drawing import RGB, draw
from engine.tools.shapes.scenes import (
    PHRASINGS,
    Group,
    Scene,
    caption,
    content_scores,
    held_out_families,
    is_held_out,
    num_phrasings,
    training_scenes,
)
from tests.tools.shapes.shape_reader import parse, rows

_STYLES = ("flat", "sketch")


@pytest.fixture(scope="module", params=_STYLES)
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    drawn.write(folder, drawn.Options(style=request.param, num_train=200, num_valid=600))
    return folder


def test_folder_form(folder):
    for split, count in (("train", 200), ("valid", 600)):
        table = rows(folder, split)
        assert list(table[0]) == ["image", "image_id", "caption", "caption_id"]
        for column in ("image", "image_id", "caption_id"):
            assert len({row[column] for row in table}) == count
        assert {p.name for p in (folder / split).iterdir()} == {row["image"] for row in table}
        with Image.open(folder / split / table[0]["image"]) as image:
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (64, 64))


def test_no_held_out_caption_is_true_of_another_image(folder):
    """All pairs, by what the captions say when read; each image shows what its own caption says."""
    said = [parse(row["caption"]) for row in rows(folder, "valid")]
    assert len(said) == 600 >= 500
    for (i, claim), (j, shown) in itertools.product(enumerate(said), repeat=2):
        assert (claim == shown) == (i == j)


def test_words_alone_cannot_tell_a_family_apart(folder):
    captions = [row["caption"] for row in rows(folder, "valid")]
    for start in range(0, 600, 4):
        family = captions[start : start + 4]
        assert len(set(family)) == 4
        assert len({tuple(sorted(text.split())) for text in family}) == 1


def test_training_never_shows_a_held_out_scene(folder):
    held_out = {parse(row["caption"]) for row in rows(folder, "valid")}
    shown = [parse(row["caption"]) for row in rows(folder, "train")]
    assert len(set(shown)) == len(shown)
    assert held_out.isdisjoint(shown)


def test_no_seed_trains_on_what_any_seed_holds_out():
    held_out = {
        scene
        for seed in range(3)
        for family in held_out_families(np.random.default_rng(seed))
        for scene in family
    }
    for seed in range(3):
        rng = np.random.default_rng(seed)
        trained = set(itertools.islice(training_scenes(rng), 3000))
        assert trained.isdisjoint(held_out)


def test_families_are_whole_and_many():
    families = held_out_families(np.random.default_rng(0))
    assert len(families) >= 900  # 3,600 images at most
    scenes = [scene for family in families for scene in family]
    assert len(set(scenes)) == 4 * len(families)
    assert all(is_held_out(scene) for scene in scenes)


def test_every_swap_occurs():
    """Held-out scenes ask for each kind of binding."""
    kinds = set()
    for family in held_out_families(np.random.default_rng(0))[:150]:
        for other in family[1:]:
            for what in ("place", "colour", "size", "count"):
                if family[0].swapped(what) == other:
                    kinds.add(what)
    assert kinds == {"place", "colour", "size", "count"}


@pytest.mark.parametrize("style", _STYLES)
def test_every_phrasing_says_the_scene(style):
    a, b = Group(2, "small", "red", "cross"), Group(1, "large", "blue", "moon")
    assert num_phrasings(style) == len(PHRASINGS[style]["above"]) >= 4
    for relation, i in itertools.product(("left", "above"), range(num_phrasings(style))):
        assert parse(caption(Scene(a, b, relation), style, i)) == Scene(a, b, relation)


def test_captions_by_hand():
    scene = Scene(Group(2, "small", "red", "circle"), Group(1, "large", "blue", "square"), "left")
    assert caption(scene, "flat", 0) == (
        "two small red circles to the left of one large blue square"
    )
    assert caption(scene, "flat", 1) == (
        "one large blue square to the right of two small red circles"
    )


def _blobs(mask) -> list[tuple[float, float, int]]:
    """Connected parts of a mask: (x, y, pixels) of each, specks left out."""
    left, blobs = set(zip(*np.nonzero(mask), strict=True)), []
    while left:
        front, part = [left.pop()], []
        while front:
            y, x = front.pop()
            part.append((y, x))
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= near
            front.extend(near)
        if len(part) >= 12:
            y, x = np.mean(part, axis=0)
            blobs.append((float(x), float(y), len(part)))
    return blobs


def test_images_show_what_is_said(tmp_path):
    """Counts, sizes and places measured on the JPEGs' pixels, found by their colour."""
    drawn.write(tmp_path, drawn.Options(num_train=1, num_valid=60))
    areas = {"small": [], "large": []}
    for row in rows(tmp_path, "valid"):
        scene = parse(row["caption"])
        pixels = np.asarray(Image.open(tmp_path / "valid" / row["image"]), dtype=np.int64)
        places = []
        for group in (scene.first, scene.second):
            mask = np.abs(pixels - RGB[group.colour]).sum(-1) < 110
            blobs = _blobs(mask)
            assert len(blobs) == group.count, row
            places.append(np.array(blobs))
            if group.shape == "circle":
                areas[group.size] += [blob[2] for blob in blobs]
        axis = 0 if scene.relation == "left" else 1
        assert places[0][:, axis].max() < 32 < places[1][:, axis].min(), row
    assert 2 * max(areas["small"]) < min(areas["large"])


@pytest.mark.parametrize("style", _STYLES)
def test_shapes_stay_inside_and_apart(style):
    """The widest rows: three large ones a group."""
    scene = Scene(Group(3, "large", "red", "star"), Group(3, "large", "blue", "cross"), "above")
    for seed in range(5):
        image = draw(scene, style, 128, np.random.default_rng(seed))
        pixels = np.asarray(image, dtype=np.int64)
        border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
        for colour in ("red", "blue"):
            assert (np.abs(border - RGB[colour]).sum(-1) > 100).all()
            mask = np.abs(pixels - RGB[colour]).sum(-1) < 90
            assert len(_blobs(mask)) == 3


def test_content_of_captions_is_scored_part_by_part():
    true = [
        "two small red circles left of one large blue square",
        "one little green star drawn above three big red moons",
    ]
    said = [
        "one large blue square right of two small green circles",  # one colour is wrong
        "a sketch with three big red moons at the bottom and one little green star at the top",
    ]
    half = content_scores(said, true)
    assert half == {
        "content_colour": 50, "content_shape": 100, "content_count": 100, "content_size": 100,
        "content_relation": 100, "content_scene": 50,
    }  # fmt: skip
    assert set(content_scores(["a dog", "words"], true).values()) == {0}
    assert content_scores(said, [true[0], "a dog"]) == {}
