"""Images with texts beside them."""

import os
import pickle

import pytest

from engine.errors import UserError
from tests.data.formats.folders import folder, image, opened, rows


def _folder(root, *names, text="about {}"):
    folder(root, *names)
    for name in names:
        (root / name).with_suffix(".txt").write_text(text.format(name), encoding="utf8")
    return root


def test_rows_come_in_the_order_of_their_names(tmp_path):
    _folder(tmp_path, "train/b.png", "train/a.jpg", "train/sub/c.webp", text=" about {}\n")
    source = opened("sidecar", tmp_path)
    assert [record.caption for record in rows(source)] == [
        "about train/a.jpg",
        "about train/b.png",
        "about train/sub/c.webp",
    ]
    record = source[2]
    assert (record.key, record.image_id, record.caption_id) == ("sub/c.webp", "sub/c.webp", "2")
    assert image(record) == tmp_path / "train" / "sub" / "c.webp"
    assert list(source.captions()) == [record.caption for record in rows(source)]
    assert len(set(source.column("image_id").tolist())) == 3
    assert rows(pickle.loads(pickle.dumps(source))) == rows(source)


def test_a_bare_folder_is_divided_by_names(tmp_path):
    names = [f"{number:03d}.png" for number in range(200)]
    _folder(tmp_path, *names)
    found = {}
    for split in ("train", "valid"):
        found[split] = {r.key for r in rows(opened("sidecar", tmp_path, split, valid_share=0.2))}
    assert found["train"] | found["valid"] == set(names)
    assert not found["train"] & found["valid"]
    assert 20 < len(found["valid"]) < 60  # four standard deviations around 40
    _folder(tmp_path, "new.png")
    again = {r.key for r in rows(opened("sidecar", tmp_path, "valid", valid_share=0.2))}
    assert again - {"new.png"} == found["valid"]
    assert len(opened("sidecar", tmp_path)) == 201  # no share: all of it


def test_texts_are_read_when_they_are_asked_for(tmp_path):
    _folder(tmp_path, "a.png")
    source = opened("sidecar", tmp_path)
    (tmp_path / "a.txt").write_text("other words")
    assert source[0].caption == "other words"


def test_what_is_wrong_with_a_text(tmp_path):
    _folder(tmp_path, "a.png", "b.png", "c.png", "d.png", "e.png")
    (tmp_path / "a.txt").unlink()
    (tmp_path / "b.txt").write_text(" \n")
    (tmp_path / "c.txt").write_bytes(b"caf\xe9")
    (tmp_path / "d.txt").unlink()
    (tmp_path / "d.txt").symlink_to("/etc/hostname")
    found = rows(opened("sidecar", tmp_path))
    assert found[:4] == ["no caption", "no caption", "not text", "outside root"]
    assert found[4].caption == "about e.png"
    assert list(opened("sidecar", tmp_path).captions()) == ["", "", "", "", "about e.png"]


def test_other_endings_of_texts(tmp_path):
    folder(tmp_path, "a.png")
    (tmp_path / "a.caption").write_text("words")
    assert opened("sidecar", tmp_path, text=".caption")[0].caption == "words"


def test_an_image_whose_name_is_no_text(tmp_path):
    _folder(tmp_path, "b.png")
    try:
        (tmp_path / "b.png").rename(tmp_path / os.fsdecode(b"\xff.png"))
    except OSError:
        pytest.skip("this file system wants names in UTF-8")
    assert rows(opened("sidecar", tmp_path)) == ["no caption"]


def test_mistakes(tmp_path):
    with pytest.raises(UserError, match="has no folder") as caught:
        opened("sidecar", tmp_path / "absent")
    assert caught.value.key == "data.datasets.mine.root"
    with pytest.raises(UserError, match=r"no images for the train split in .*\.jpg \.jpeg"):
        opened("sidecar", tmp_path)
    _folder(tmp_path, "a.png")
    with pytest.raises(UserError, match=r"valid_share, say 0\.1"):
        opened("sidecar", tmp_path, "valid")
