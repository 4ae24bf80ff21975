"""Class folders as a source: labels, order, caching, and what is refused."""

import pickle

import pytest
from PIL import Image

from engine.config import schema
from engine.data.formats import imagefolder
from engine.data.sources import open_source
from engine.errors import UserError
from engine.types import BadSample
from tests.data.formats.folders import image


def fill(root, **splits):
    """splits: train={"cat": 2} puts two images into train/cat."""
    for split, classes in splits.items():
        for name, count in classes.items():
            folder = root / split / name
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(count):
                Image.new("RGB", (4, 4), (i, 0, 0)).save(folder / f"{i}.jpg")
    return root


def opened(root, split, cache, **options):
    config = imagefolder.Config(root=root, **options)
    return imagefolder.build(config, name="pets", split=split, cache_dir=cache)


@pytest.fixture
def pets(tmp_path):
    return fill(tmp_path / "pets", train={"cat": 2, "big_dog": 3}, valid={"cat": 1, "emu": 1})


def test_rows(pets, tmp_path):
    source = opened(pets, "train", tmp_path / "cache")
    assert source.classes == ["big_dog", "cat", "emu"]  # of both splits, so that labels agree
    records = [source[i] for i in range(len(source))]
    assert [record.label for record in records] == [0, 0, 0, 1, 1]
    assert [record.key for record in records][-1] == "cat/1.jpg"
    assert image(records[0]) == pets / "train" / "big_dog" / "0.jpg"
    assert records[0].caption == "big dog"
    assert source.column("label").tolist() == [0, 0, 0, 1, 1]
    assert source.column("image_id").tolist() == [0, 1, 2, 3, 4]
    assert list(source.captions()) == ["big dog"] * 3 + ["cat"] * 2
    valid = opened(pets, "valid", tmp_path / "cache")
    assert [valid[i].label for i in range(2)] == [1, 2]


def test_pickled_for_workers(pets, tmp_path):
    source = opened(pets, "train", tmp_path / "cache")
    copy = pickle.loads(pickle.dumps(source))
    assert [copy[i] for i in range(5)] == [source[i] for i in range(5)]


def test_only_images_count(pets, tmp_path):
    (pets / "train" / "cat" / "notes.txt").write_text("x")
    (pets / "train" / "cat" / ".0.jpg").write_text("x")
    (pets / "train" / "cat" / "LOUD.JPG").write_text("x")
    (pets / "train" / ".cache").mkdir()
    (pets / "train" / "labels.csv").write_text("x")
    source = opened(pets, "train", tmp_path / "cache")
    assert [source[i].key for i in (3, 4, 5)] == ["cat/0.jpg", "cat/1.jpg", "cat/LOUD.JPG"]
    assert len(source) == 6


def test_listed_once_until_a_folder_changes(pets, tmp_path, monkeypatch):
    opened(pets, "train", tmp_path / "cache")
    listed = []
    real = imagefolder.images_in
    monkeypatch.setattr(imagefolder, "images_in", lambda f: listed.append(f) or real(f))
    assert len(opened(pets, "train", tmp_path / "cache")) == 5
    assert listed == []
    fill(pets, train={"cat": 4})
    assert len(opened(pets, "train", tmp_path / "cache")) == 7
    assert len(listed) == 2  # the class folders of that split


def test_links_out_of_the_root_are_bad_samples(pets, tmp_path):
    outside = tmp_path / "outside.jpg"
    Image.new("RGB", (2, 2)).save(outside)
    (pets / "train" / "cat" / "link.jpg").symlink_to(outside)
    source = opened(pets, "train", tmp_path / "cache")
    with pytest.raises(BadSample, match="outside root"):
        source[5]


def test_other_names_of_splits(tmp_path):
    root = fill(tmp_path / "in", train={"a": 1}, val={"a": 2})
    assert len(opened(root, "valid", tmp_path / "cache", valid="val")) == 2
    with pytest.raises(UserError, match=r"folders in .*: train, val\. Name one as valid: FOLDER"):
        opened(root, "valid", tmp_path / "cache")


def test_faults_name_path_and_key(tmp_path):
    with pytest.raises(UserError, match="no folder") as caught:
        opened(tmp_path / "none", "train", tmp_path / "cache")
    assert caught.value.key == "data.datasets.pets.root"
    (tmp_path / "empty" / "train").mkdir(parents=True)
    with pytest.raises(UserError, match="holds no class folders"):
        opened(tmp_path / "empty", "train", tmp_path / "cache")
    (tmp_path / "empty" / "train" / "cat").mkdir()
    with pytest.raises(UserError, match="no images in the class folders"):
        opened(tmp_path / "empty", "train", tmp_path / "cache")


def labelled(root, **tables):
    """tables: train="a.jpg,cat" puts a CSV of files and labels, and the images, into root."""
    for split, lines in tables.items():
        (root / split).mkdir(parents=True)
        (root / f"{split}.csv").write_text("file,label\n" + "\n".join(lines) + "\n")
        for line in lines:
            Image.new("RGB", (4, 4)).save(root / split / line.partition(",")[0])
    return root


LABELS = {"train_labels": "train.csv", "valid_labels": "valid.csv"}


def test_labels_from_a_csv(tmp_path):
    root = labelled(tmp_path / "a", train=["b.jpg,cat", "a.jpg,big_dog"], valid=["c.jpg,emu"])
    source = opened(root, "train", tmp_path, **LABELS)
    assert source.classes == ["big_dog", "cat", "emu"]
    assert [source[i].label for i in range(2)] == [1, 0]
    assert source[1].caption == "big dog" and source[1].labels == ("big_dog",)
    assert image(source[0]) == root / "train" / "b.jpg"
    assert source.column("label").tolist() == [1, 0]
    assert opened(root, "valid", tmp_path, **LABELS)[0].label == 2
    assert list(opened(root, "valid", tmp_path, **LABELS).captions()) == ["emu"]
    (root / "valid.csv").write_text("file,label\nc.jpg,ant\n")
    assert opened(root, "train", tmp_path, **LABELS)[0].label == 2


def test_rows_of_a_csv_without_a_label(tmp_path):
    root = labelled(tmp_path / "a", train=["a.jpg,cat", "b.jpg,"], valid=["c.jpg,cat"])
    source = opened(root, "train", tmp_path, **LABELS)
    assert source[0].label == 0
    with pytest.raises(BadSample, match="row 2 has not one image and one label"):
        source[1]
    assert source.column("label").tolist() == [0, -1]


def test_mistakes_in_label_files_are_named(tmp_path):
    root = labelled(tmp_path / "a", train=["a.jpg,cat"], valid=["c.jpg,cat"])
    with pytest.raises(UserError, match="has no valid_labels") as caught:
        opened(root, "valid", tmp_path, train_labels="train.csv")
    assert caught.value.key == "data.datasets.pets.valid_labels"
    with pytest.raises(UserError, match=r"no annotation file .*x\.csv.*: train\.csv, valid\.csv"):
        opened(root, "train", tmp_path, train_labels="x.csv")
    (root / "train.csv").write_text("file,score\na.jpg,1\n")
    with pytest.raises(UserError, match=r"no column label or .*: file, score"):
        opened(root, "train", tmp_path, **LABELS)
    (root / "train.csv").write_text("file,label\n../a.jpg,cat\n")
    with pytest.raises(UserError, match="names an image outside"):
        opened(root, "train", tmp_path, **LABELS)


def test_through_the_configuration(pets, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data = schema.Data(
        data_path=str(pets.parent), datasets={"pets": {"format": "imagefolder", "root": "pets"}}
    )
    assert len(open_source("pets", "train", data, key="data.train_name")) == 5


def test_public_class_folders(shared_data, tmp_path):
    source = opened(shared_data / "cifar10", "valid", tmp_path)
    assert (len(source), len(source.classes)) == (1000, 10)
    assert source[999].label == 9
