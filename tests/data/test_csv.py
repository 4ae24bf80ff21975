"""The CSV folder form."""

import csv
import pickle
import shutil
from pathlib import Path

import pytest
from PIL import Image

from engine.data.formats.csv import Config, build
from engine.errors import UserError
from engine.types import BadSample
from tests.data.formats.folders import image

_ROWS = [("a.jpg", "7", "a dog", "70"), ("sub/b.jpg", "8", "a cat", "80"), ("a.jpg", "7", "x", "1")]


def _dataset(root: Path, rows=_ROWS, split="train") -> Path:
    (root / split / "sub").mkdir(parents=True)
    for name in ("a.jpg", "sub/b.jpg"):
        Image.new("RGB", (8, 8)).save(root / split / name)
    with (root / f"{split}_anno.csv").open("w", newline="", encoding="utf8") as file:
        csv.writer(file).writerows([("image", "image_id", "caption", "caption_id"), *rows])
    return root


def _build(root: Path, split="train", **options):
    config = Config(root=root, **options)
    return build(config, name="mine", split=split, cache_dir=root / "cache")


def test_rows(tmp_path):
    source = _build(_dataset(tmp_path))
    assert (source.name, source.split, len(source)) == ("mine", "train", 3)
    record = source[1]
    assert (record.key, record.caption) == ("sub/b.jpg", "a cat")
    assert (record.image_id, record.caption_id, record.label) == ("8", "80", None)
    assert image(record) == tmp_path / "train" / "sub" / "b.jpg"
    assert source.column("image_id").tolist() == [0, 1, 0]
    assert list(source.captions()) == ["a dog", "a cat", "x"]


def test_splits_have_their_own_file_and_folder(tmp_path):
    _dataset(tmp_path)
    _dataset(tmp_path, rows=[("a.jpg", "1", "held out", "1")], split="valid")
    source = _build(tmp_path, "valid")
    assert len(source) == 1
    assert image(source[0]) == tmp_path / "valid" / "a.jpg"


def test_other_file_names(tmp_path):
    _dataset(tmp_path)
    (tmp_path / "train_anno.csv").rename(tmp_path / "captions.csv")
    (tmp_path / "train").rename(tmp_path / "images")
    options = {"valid_anno": "captions.csv", "valid_images": "images"}
    assert _build(tmp_path, "valid", **options)[0].images[0] == tmp_path / "images" / "a.jpg"


def test_pickles(tmp_path):
    source = _build(_dataset(tmp_path))
    again = pickle.loads(pickle.dumps(source))
    assert [again[i] for i in range(3)] == [source[i] for i in range(3)]


def test_caption_of_spaces_is_none(tmp_path):
    source = _build(_dataset(tmp_path, rows=[("a.jpg", 0, " \t ", 0), ("a.jpg", 0, "", 1)]))
    for index in range(2):
        with pytest.raises(BadSample, match=f"row {index + 1}") as caught:
            source[index]
        assert caught.value.cause == "no caption"


def test_questions_answers_and_labels(tmp_path):
    root = _dataset(tmp_path)
    (root / "train_anno.csv").write_text(
        "image;question;answer;labels\na.jpg;What?;cat|dog|dog;cat|dog\na.jpg;Who?;;\n"
    )
    source = _build(root)
    first, second = source[0], source[1]
    assert first.turns == (("human", "What?"), ("gpt", "dog"))
    assert (first.answers, first.labels) == (("cat", "dog", "dog"), ("cat", "dog"))
    assert first.caption == "What? dog"
    assert second.turns == (("human", "Who?"),) and second.answers == second.labels == ()
    named = _build(root, columns={"labels": "answer"})
    assert named[0].labels == ("cat", "dog", "dog")


def test_question_ids_and_types(tmp_path):
    root = _dataset(tmp_path)
    (root / "train_anno.csv").write_text(
        "image,question_id,question,answer,question_type,answer_type\n"
        "a.jpg,17,Is it?,yes|no|yes,is it,yes/no\n"
    )
    record = _build(root)[0]
    kinds = record.question_type, record.answer_type
    assert (record.caption_id, *kinds) == ("17", "is it", "yes/no")
    assert record.answers == ("yes", "no", "yes")


@pytest.mark.parametrize("row", [b"a.jpg,\xff\xfe", b"\xff.jpg,text"])
def test_bytes_that_are_no_text_spoil_their_row(tmp_path, row):
    root = _dataset(tmp_path)
    (root / "train_anno.csv").write_bytes(b"image,caption\na.jpg,fine\n" + row + b"\n")
    source = _build(root)
    assert source[0].caption == "fine" and list(source.captions()) == ["fine", ""]
    with pytest.raises(BadSample, match="row 2 is not UTF-8") as caught:
        source[1]
    assert caught.value.cause == "not text"


def test_row_without_an_image(tmp_path):
    with pytest.raises(BadSample, match="row 1 names no image"):
        _build(_dataset(tmp_path, rows=[("", 0, "words", 0)]))[0]


def test_link_to_another_place_is_refused(tmp_path):
    root = _dataset(tmp_path / "set", rows=[("out.jpg", 0, "x", 0), ("in.jpg", 1, "y", 1)])
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    (root / "train" / "out.jpg").symlink_to(tmp_path / "secret.jpg")
    (root / "train" / "in.jpg").symlink_to(root / "train" / "a.jpg")
    source = _build(root)
    with pytest.raises(BadSample, match=r"secret\.jpg") as caught:
        source[0]
    assert caught.value.cause == "outside root"
    assert source[1].key == "in.jpg"


def test_neighbour_folder_is_outside(tmp_path):
    """'train_private' begins like 'train'."""
    root = _dataset(tmp_path, rows=[("link/x.jpg", 0, "x", 0)])
    (tmp_path / "train_private").mkdir()
    (root / "train" / "link").symlink_to(tmp_path / "train_private")
    with pytest.raises(BadSample, match="outside root"):
        _build(root)[0]


def test_image_folder_may_itself_be_a_link(tmp_path):
    root = _dataset(tmp_path / "set")
    shutil.move(root / "train", tmp_path / "big_disk")
    (root / "train").symlink_to(tmp_path / "big_disk")
    assert _build(root)[0].images[0].exists()


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(UserError, match=r"'mine' has no folder .*/none"):
        _build(tmp_path / "none")
    root = _dataset(tmp_path / "set")
    (root / "valid").mkdir()
    with pytest.raises(UserError, match=r"no annotation file .*valid_anno\.csv.*train_anno\.csv"):
        _build(root, "valid")
    shutil.rmtree(root / "train")
    with pytest.raises(UserError, match=r"'mine' has no image folder .*/train"):
        _build(root)


def test_real_captions(shared_data, tmp_path):
    """Every row as the csv module reads it; 1,000 photographs with five captions each."""
    real = shared_data / "flickr8k"
    shutil.copy(real / "valid_anno.csv", tmp_path)  # so that the table is not cached beside it
    (tmp_path / "valid").symlink_to(real / "valid")
    source = _build(tmp_path, "valid")
    with (real / "valid_anno.csv").open(newline="", encoding="utf8") as file:
        rows = list(csv.DictReader(file))
    assert len(source) == len(rows) == 5000
    for index in range(0, 5000, 7):
        record, row = source[index], rows[index]
        assert record.caption == row["caption"]
        assert (record.image_id, record.caption_id) == (row["image_id"], row["caption_id"])
        assert image(record) == tmp_path / "valid" / row["image"]
        assert image(record).is_file()
    assert len(set(source.column("image_id").tolist())) == 1000


def test_real_questions_and_labels(shared_data, tmp_path):
    for name in ("vqa.csv", "objects.csv"):
        shutil.copy(shared_data / "coco" / name, tmp_path)
    options = {"train_images": "."}
    questions = _build(tmp_path, train_anno="vqa.csv", **options)
    assert len(questions) == 284 and len(questions[0].answers) == 10
    assert questions[0].turns == (("human", "What color are the gym shoes?"), ("gpt", "white"))
    objects = _build(tmp_path, train_anno="objects.csv", **options)
    assert objects[0].labels == ("potted plant", "vase")
    assert objects[0].caption == "potted plant, vase"
    assert objects[0].image_id == "30"
