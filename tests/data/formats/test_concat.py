"""Datasets counted as one."""

import pytest
from PIL import Image

from engine.config import schema
from engine.data.sources import open_source
from engine.data.stream.source import Stream
from engine.errors import UserError
from tests.data.formats.folders import image


@pytest.fixture
def opened(tmp_path):
    """Opens 'both' of the parts one (3 rows) and two (4 rows), with the same image names."""
    for name, count in (("one", 3), ("two", 4)):
        (tmp_path / name / "train").mkdir(parents=True)
        rows = [f"{n}.jpg,{name} {n}" for n in range(count)]
        (tmp_path / name / "train_anno.csv").write_text("\n".join(["image,caption", *rows]) + "\n")

    def open_with(datasets=None, **options):
        both = {"format": "concat", "parts": ["one", "two"], **options}
        data = schema.Data(data_path=str(tmp_path), datasets={"both": both, **(datasets or {})})
        return open_source("both", "train", data, key="data.train_name")

    return open_with


def test_end_to_end(opened, tmp_path):
    source = opened()
    assert (source.name, source.split, len(source)) == ("both", "train", 7)
    texts = [f"one {n}" for n in range(3)] + [f"two {n}" for n in range(4)]
    assert [source[row].caption for row in range(7)] == texts == list(source.captions())
    assert image(source[3]) == tmp_path / "two" / "train" / "0.jpg"
    assert source.column("image_id").tolist() == list(range(7))  # equal names, other images


def test_options_of_the_parts_and_of_the_whole(opened):
    parts = {"one": {"format": "csv", "repeat": 2}, "two": {"format": "csv", "cap": 2}}
    assert len(opened(parts)) == 3 * 2 + 2
    assert len(opened(parts, cap=5)) == 5
    assert len(opened(parts, repeat=3)) == 24
    texts = {opened(captions="joined")[row].caption for row in range(7)}
    assert texts == {f"one {n}" for n in range(3)} | {f"two {n}" for n in range(4)}


def test_of_parts_that_are_made_of_parts(opened):
    inner = {"inner": {"format": "concat", "parts": ["one"]}}
    assert len(opened(inner, parts=["inner", "two"])) == 7


@pytest.mark.parametrize(
    ("options", "message", "key"),
    [
        ({"parts": ["one", "tow"]}, "'tow'; did you mean 'two'", "data.datasets.both.parts"),
        ({"parts": ["one", "one"]}, "part 'one' twice; .*repeat: 2", "data.datasets.both.parts"),
        ({"parts": []}, "parts: .*at least 1", "data.datasets.both.parts"),
        ({"root": "x"}, "concat has no 'root'", "data.datasets.both.root"),
        ({"length": 8}, "has 7 training rows", "data.datasets.both.length"),
        ({"parts": ["both"]}, "contains itself: both → both", "data.datasets.both.parts"),
        (
            {"parts": ["one", "loop"]},
            "contains itself: both → loop → both",
            "data.datasets.loop.parts",
        ),
    ],
)
def test_what_is_refused(opened, options, message, key):
    with pytest.raises(UserError, match=message) as caught:
        opened({"loop": {"format": "concat", "parts": ["both"]}}, **options)
    assert caught.value.key == key


def test_fault_of_a_part_points_at_it(opened, tmp_path):
    (tmp_path / "two" / "train_anno.csv").unlink()
    with pytest.raises(UserError, match="'two' has no annotation file") as caught:
        opened()
    assert caught.value.key == "data.datasets.both.parts"


class Streamed(Stream):
    def __init__(self, name):
        self.name, self.split = name, "train"

    def __len__(self):
        return 5


def test_streamed_parts_are_refused(opened, monkeypatch):
    from engine.data.formats import csv

    monkeypatch.setattr(csv, "build", lambda config, *, name, split, cache_dir: Streamed(name))
    with pytest.raises(UserError, match="streamed parts"):
        opened()
    with pytest.raises(UserError, match="'one' is streamed: cap needs rows"):
        opened({"one": {"format": "csv", "cap": 3}})


def test_classes_must_be_those_of_all_parts(opened, tmp_path):
    for name, classes in (("pets", ["cat", "dog"]), ("more", ["cat", "dog"]), ("cars", ["van"])):
        for class_name in classes:
            folder = tmp_path / name / "train" / class_name
            folder.mkdir(parents=True)
            Image.new("RGB", (4, 4)).save(folder / "x.png")
    folders = {name: {"format": "imagefolder"} for name in ("pets", "more", "cars")}
    source = opened(folders, parts=["pets", "more"])
    assert source.classes == ["cat", "dog"]
    assert source.column("label").tolist() == [0, 1, 0, 1]
    with pytest.raises(UserError, match="different classes, 'pets' and 'cars'"):
        opened(folders, parts=["pets", "cars"])
