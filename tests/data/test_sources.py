"""Datasets by name."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from engine.config import schema
from engine.data.sources import BUILT_IN, cache_dir, open_source
from engine.errors import UserError
from tests.data.formats.folders import image

_KEY = "data.train_name"


def _csv(root: Path, caption="a dog") -> None:
    (root / "train").mkdir(parents=True)
    (root / "train_anno.csv").write_text(f"image,caption\na.jpg,{caption}\n")


def _data(path: Path, **datasets) -> schema.Data:
    return schema.Data(data_path=str(path), datasets=datasets)


def test_bare_name_is_a_folder(tmp_path):
    _csv(tmp_path / "mine")
    source = open_source("mine", "train", _data(tmp_path), key=_KEY)
    assert (source.name, source.split, len(source)) == ("mine", "train", 1)
    assert image(source[0]) == tmp_path / "mine" / "train" / "a.jpg"


def test_configured_dataset(tmp_path):
    _csv(tmp_path / "deep" / "place")
    data = _data(tmp_path, mine={"format": "csv", "root": "deep/place"})
    assert open_source("mine", "train", data, key=_KEY)[0].caption == "a dog"
    data = _data(tmp_path / "other", mine={"format": "csv", "root": str(tmp_path / "deep/place")})
    assert open_source("mine", "train", data, key=_KEY)[0].caption == "a dog"


def test_configured_dataset_goes_before_a_folder(tmp_path):
    _csv(tmp_path / "mine", "of the folder")
    _csv(tmp_path / "other", "configured")
    data = _data(tmp_path, mine={"format": "csv", "root": "other"})
    assert open_source("mine", "train", data, key=_KEY)[0].caption == "configured"


def test_own_folder_goes_before_the_built_in_dataset(tmp_path):
    _csv(tmp_path / "shapes", "my own shapes")
    source = open_source("shapes", "train", _data(tmp_path), key=_KEY)
    assert source[0].caption == "my own shapes"


@pytest.mark.parametrize("name", sorted(BUILT_IN))
def test_built_in_names(tmp_path, monkeypatch, name):
    """Drawn into data_path at first use, with default options."""
    from engine.tools.shapes import folder

    write, used = folder.write, []

    def write_few(path, options):
        used.append(options)
        write(path, replace(options, num_train=4, num_valid=4))

    monkeypatch.setattr(folder, "write", write_few)
    monkeypatch.setattr("engine.data.formats.shapes._check", lambda *_: None)
    source = open_source(name, "train", _data(tmp_path / "data"), key=_KEY)
    of_questions = "texts" in BUILT_IN[name]
    assert len(source) > 16 if of_questions else len(source) == 4
    assert image(source[0]).is_relative_to(tmp_path / "data" / name)
    style = BUILT_IN[name].get("style", "flat")
    assert used == [folder.Options(style=style, questions=of_questions)]


def test_drawn_folder_is_found_again_by_its_bare_name(tmp_path):
    options = {"format": "shapes", "num_train": 4, "num_valid": 4}
    open_source("tiny", "train", _data(tmp_path, tiny=options), key=_KEY)
    assert len(open_source("tiny", "valid", _data(tmp_path), key=_KEY)) == 4


def test_unknown_name(tmp_path):
    _csv(tmp_path / "flickr")
    data = _data(tmp_path, coco={"format": "csv"})
    with pytest.raises(UserError) as caught:
        open_source("flicker", "train", data, key=_KEY)
    assert caught.value.key == _KEY
    for word in ("'flicker'", "did you mean 'flickr'", "coco", "shapes", str(tmp_path)):
        assert word in str(caught.value)


def test_data_path_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="no dataset is called 'mine'"):
        open_source("mine", "train", _data(tmp_path / "none"), key=_KEY)


def test_folder_without_annotations_names_the_users_key(tmp_path):
    (tmp_path / "mine" / "valid").mkdir(parents=True)
    with pytest.raises(UserError, match=r"no annotation file .*valid_anno\.csv") as caught:
        open_source("mine", "valid", _data(tmp_path), key="data.valid_name")
    assert caught.value.key == "data.valid_name"


@pytest.mark.parametrize(
    ("options", "message", "key"),
    [
        ({}, "has no format; known: .*csv", ""),
        ({"format": "cvs"}, "'cvs'; did you mean 'csv'", ".format"),
        ({"format": "csv", "rot": "x"}, "has no 'rot'; did you mean 'root'", ".rot"),
        ({"format": "shapes", "style": "round"}, "style: .*'flat' or 'sketch'", ".style"),
        ({"format": "shapes", "num_valid": 99999}, "num_valid: .*3600", ".num_valid"),
    ],
)
def test_wrong_options(tmp_path, options, message, key):
    with pytest.raises(UserError, match=message) as caught:
        open_source("mine", "train", _data(tmp_path, mine=options), key=_KEY)
    assert caught.value.key == f"data.datasets.mine{key}"


def test_format_from_outside(tmp_path, monkeypatch):
    """A dotted name loads the user's own module."""
    (tmp_path / "my_format.py").write_text(
        "from pathlib import Path\n"
        "from engine.config.schema import Section\n"
        "class Config(Section):\n"
        "    root: Path\n"
        "    length: int\n"
        "def build(config, *, name, split, cache_dir):\n"
        "    return [name, split, config.root] * config.length\n"
    )
    package = tmp_path / "my_package"
    package.mkdir()
    (tmp_path / "my_format.py").rename(package / "form.py")
    monkeypatch.syspath_prepend(tmp_path)
    data = _data(Path("data"), mine={"format": "my_package.form", "length": "2"})
    assert open_source("mine", "train", data, key=_KEY) == ["mine", "train", Path("data/mine")] * 2
    sys.modules.pop("my_package.form")


def test_cache_folder(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_dir() == Path("/somewhere/engine")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache" / "engine"
