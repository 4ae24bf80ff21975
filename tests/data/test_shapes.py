"""The built-in dataset: what its captions say, what its images show, and what is held out.

Captions are parsed here and images measured here, independently of the code that made them.
"""

import csv
import itertools
import json
import multiprocessing
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engine.data.formats import shapes as form
from engine.data.shapes import folder as drawn
from engine.data.shapes.drawing import RGB, draw
from engine.data.shapes.scene import (
    Group,
    Scene,
    held_out_families,
    is_held_out,
    training_scenes,
    true_of,
)
from engine.data.shapes.wording import PHRASINGS, caption, num_phrasings
from engine.errors import UserError

_GROUP = re.compile(r"(one|two|three) (small|little|large|big) (\w+) (\w+)")
_NOUNS = {"circles": "circle", "squares": "square", "triangles": "triangle",
          "crosses": "cross", "stars": "star", "moons": "moon"}  # fmt: skip
_STYLES = ("flat", "sketch")


def _parse(text: str) -> Scene:
    """What a caption says, by a person's reading of it."""
    first, second = _GROUP.finditer(text)
    groups = [
        Group(
            {"one": 1, "two": 2, "three": 3}[number],
            {"small": "small", "little": "small", "large": "large", "big": "large"}[size],
            colour,
            _NOUNS.get(noun, noun),
        )
        for number, size, colour, noun in (first.groups(), second.groups())
    ]
    between = set(text[first.end() : second.start()].split())
    found = [
        (relation, is_inverse)
        for relation, is_inverse, words in (
            ("left", False, {"left"}),
            ("left", True, {"right"}),
            ("above", False, {"above", "over", "higher", "top"}),
            ("above", True, {"below", "under", "lower", "bottom"}),
        )
        if between & words
    ]
    [(relation, is_inverse)] = found
    return Scene(*(groups[::-1] if is_inverse else groups), relation)


def _rows(folder: Path, split: str) -> list[dict[str, str]]:
    with (folder / f"{split}_anno.csv").open(newline="", encoding="utf8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module", params=_STYLES)
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    drawn.write(folder, drawn.Options(style=request.param, num_train=200, num_valid=600))
    return folder


def test_folder_form(folder):
    for split, count in (("train", 200), ("valid", 600)):
        rows = _rows(folder, split)
        assert list(rows[0]) == ["image", "image_id", "caption", "caption_id"]
        for column in ("image", "image_id", "caption_id"):
            assert len({row[column] for row in rows}) == count
        assert {p.name for p in (folder / split).iterdir()} == {row["image"] for row in rows}
        with Image.open(folder / split / rows[0]["image"]) as image:
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (64, 64))


def test_no_held_out_caption_is_true_of_another_image(folder):
    """All pairs, by what the captions say when read; each image shows what its own caption says."""
    said = [_parse(row["caption"]) for row in _rows(folder, "valid")]
    assert len(said) == 600 >= 500
    for (i, claim), (j, shown) in itertools.product(enumerate(said), repeat=2):
        holds = claim == shown
        assert holds == (i == j)
        assert true_of(claim, shown) == holds


def test_words_alone_cannot_tell_a_family_apart(folder):
    captions = [row["caption"] for row in _rows(folder, "valid")]
    for start in range(0, 600, 4):
        family = captions[start : start + 4]
        assert len(set(family)) == 4
        assert len({tuple(sorted(text.split())) for text in family}) == 1


def test_training_never_shows_a_held_out_scene(folder):
    held_out = {_parse(row["caption"]) for row in _rows(folder, "valid")}
    shown = [_parse(row["caption"]) for row in _rows(folder, "train")]
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
        assert _parse(caption(Scene(a, b, relation), style, i)) == Scene(a, b, relation)


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
    for row in _rows(tmp_path, "valid"):
        scene = _parse(row["caption"])
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


def _files(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file() and ".engine_cache" not in p.parts
    }


def _build(root: Path, split="train", **options):
    options = {"num_train": 12, "num_valid": 8, **options}
    config = form.Config(root=root, **options)
    return form.build(config, name=root.name, split=split, cache_dir=root.parent / "cache")


def test_drawn_at_first_use_by_the_seed(tmp_path):
    source = _build(tmp_path / "one")
    assert (source.name, len(source)) == ("one", 12)
    assert source[3].image.is_file()
    assert len(_build(tmp_path / "one", "valid")) == 8
    _build(tmp_path / "two")
    _build(tmp_path / "three", seed=1)
    one, two, three = (_files(tmp_path / name) for name in ("one", "two", "three"))
    assert one == two
    assert one.keys() == three.keys()
    assert one["train/000000.jpg"] != three["train/000000.jpg"]


def test_styles_differ_in_pictures_and_words(tmp_path):
    flat, sketch = _build(tmp_path / "flat"), _build(tmp_path / "sketch", style="sketch")
    light, dark = (np.asarray(Image.open(source[0].image)).mean() for source in (flat, sketch))
    assert light > 180 > 90 > dark
    assert {flat[i].caption for i in range(12)}.isdisjoint(sketch[i].caption for i in range(12))


def test_smaller_dataset_is_the_beginning_of_a_larger(tmp_path):
    small = _files(_build(tmp_path / "small").images.parent)
    large = _files(_build(tmp_path / "large", num_train=20, num_valid=20).images.parent)
    for name in ("train/000011.jpg", "valid/000007.jpg"):
        assert small[name] == large[name]


def test_other_options_than_drawn_with(tmp_path):
    _build(tmp_path / "mine")
    with pytest.raises(UserError, match=r"num_train=12 \(wanted: 13\)") as caught:
        _build(tmp_path / "mine", num_train=13)
    assert caught.value.key == "data.datasets.mine.num_train"


def test_folder_of_the_user_is_left_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "precious.txt").write_text("keep")
    with pytest.raises(UserError, match="was not drawn by the engine"):
        _build(tmp_path / "mine")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["precious.txt"]


def test_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot draw dataset 'mine' into .*file/mine"):
        _build(tmp_path / "file" / "mine")


def test_interrupted_drawing_leaves_no_folder(tmp_path, monkeypatch):
    def interrupt(folder, options):
        (folder / "train").mkdir()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(drawn, "write", interrupt)
        _build(tmp_path / "mine")
    assert not (tmp_path / "mine").exists()
    assert len(_build(tmp_path / "mine")) == 12


def _build_and_count(root: Path, queue) -> None:
    source = _build(root)
    queue.put(sum(source[i].image.is_file() for i in range(len(source))))


def test_processes_that_start_together(tmp_path):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    processes = [
        context.Process(target=_build_and_count, args=(tmp_path / "mine", queue)) for _ in range(2)
    ]
    for process in processes:
        process.start()
    assert [queue.get(timeout=60) for _ in processes] == [12, 12]
    for process in processes:
        process.join(60)
    assert json.loads((tmp_path / "mine" / "shapes.json").read_text())["num_train"] == 12
