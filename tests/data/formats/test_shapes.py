"""The built-in dataset as a format: drawn once, whole, by its options alone."""

import json
import multiprocessing
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engine.config.schema import Data
from engine.data.formats import shapes as form
from engine.data.sources import BUILT_IN, open_source
from engine.errors import UserError
from engine.tools.shapes import folder as drawn
from tests.data.formats.folders import image


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
    assert image(source[3]).is_file()
    assert len(_build(tmp_path / "one", "valid")) == 8
    _build(tmp_path / "two")
    _build(tmp_path / "three", seed=1)
    one, two, three = (_files(tmp_path / name) for name in ("one", "two", "three"))
    assert one == two
    assert one.keys() == three.keys()
    assert one["train/000000.jpg"] != three["train/000000.jpg"]


def test_styles_differ_in_pictures_and_words(tmp_path):
    flat, sketch = _build(tmp_path / "flat"), _build(tmp_path / "sketch", style="sketch")
    light, dark = (np.asarray(Image.open(image(source[0]))).mean() for source in (flat, sketch))
    assert light > 180 > 90 > dark
    assert {flat[i].caption for i in range(12)}.isdisjoint(sketch[i].caption for i in range(12))


def test_smaller_dataset_is_the_beginning_of_a_larger(tmp_path):
    small = _files(_build(tmp_path / "small").images.folder.parent)
    large = _files(_build(tmp_path / "large", num_train=20, num_valid=20).images.folder.parent)
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
    queue.put(sum(image(source[i]).is_file() for i in range(len(source))))


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


@pytest.mark.parametrize("name", ["shapes", "shapes_questions"])
def test_a_built_in_dataset_is_the_same_once_it_is_drawn(tmp_path, name):
    """Also under a bare name, where a folder of that name is there the second time."""
    data = Data(data_path=str(tmp_path))
    options = {**BUILT_IN[name], "num_train": 12, "num_valid": 8}
    first = open_source(
        name, "train", Data(data_path=str(tmp_path), datasets={name: options}), key="x"
    )
    second = open_source(name, "train", data, key="x")
    assert [first[i] for i in range(len(first))] == [second[i] for i in range(len(second))]
    assert second.content_scores is not None and bool(second[0].turns) == (name != "shapes")


def test_a_folder_that_was_not_drawn_is_the_users_own_whatever_its_name(tmp_path):
    _build(tmp_path / "shapes_questions")
    for content in ("not JSON", '{"circles": 4}', None):
        options = tmp_path / "shapes_questions" / "shapes.json"
        options.unlink() if content is None else options.write_text(content)
        source = open_source("shapes_questions", "train", Data(data_path=str(tmp_path)), key="x")
        assert (len(source), source[0].turns) == (12, ())
