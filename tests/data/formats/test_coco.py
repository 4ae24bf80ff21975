"""COCO captions and Karpathy's splits."""

import json
import pickle

import pytest

from engine.errors import UserError
from tests.data.formats.folders import folder, image, opened, put, rows

_IMAGES = [{"id": 7, "file_name": "a.jpg"}, {"id": 8, "file_name": "b.jpg"}]


def _captions(root, annotations, images=_IMAGES, name="captions_train2017.json"):
    folder(root, "train2017/a.jpg", "train2017/b.jpg")
    whole = {"info": {}, "annotations": annotations, "images": images, "licenses": [1]}
    put(root / "annotations" / name, whole)
    return root


def _caption(number, image, caption):
    return {"id": number, "image_id": image, "caption": caption}


def test_one_row_a_caption(tmp_path):
    annotations = [_caption(1, 8, "a dog"), _caption(2, 7, "ein Käfer"), _caption(3, 8, "a puppy")]
    source = opened("coco", _captions(tmp_path, annotations))
    assert [source[i].caption for i in range(3)] == ["a dog", "ein Käfer", "a puppy"]
    record = source[0]
    assert (record.key, record.image_id, record.caption_id) == ("b.jpg", "8", "1")
    assert image(record) == tmp_path / "train2017" / "b.jpg" and image(record).is_file()
    assert (record.turns, record.answers, record.labels, record.label) == ((), (), (), None)
    assert source.column("image_id").tolist() == [0, 1, 0]
    assert list(source.captions()) == ["a dog", "ein Käfer", "a puppy"]
    copy = pickle.loads(pickle.dumps(source))
    assert rows(copy) == rows(source)


def test_other_names(tmp_path):
    _captions(tmp_path, [_caption(1, 7, "x")], name="mine.json")
    options = {"valid_anno": "annotations/mine.json", "valid_images": "train2017"}
    assert len(opened("coco", tmp_path, "valid", **options)) == 1


def test_entries_that_are_something_else(tmp_path):
    """They are bad samples, one by one; ids may be NaN, huge, absent, of any type."""
    annotations = [
        _caption(1, 7, "good"), 3, None, [], {}, _caption(2, float("nan"), "x"),
        _caption(2, 10**60, "x"), _caption(2, True, "x"), _caption(2, [7], "x"),
        _caption(2, 7, None), _caption(2, 7, {"a": "b"}), _caption({}, 7, "x"),
        _caption(2, 99, "x"), _caption(2, 7, " "), _caption(2, 7, "\ud800"), _caption(1, "7", "y"),
    ]  # fmt: skip
    images = [*_IMAGES, 5, {"id": float("inf"), "file_name": "c.jpg"}, {"id": 99}]
    found = rows(opened("coco", _captions(tmp_path, annotations, images)))
    assert found[0].caption == "good" and found[-1].caption == "y"
    assert found[1:12] == ["malformed"] * 11
    assert found[12:15] == ["missing", "no caption", "not text"]


@pytest.mark.parametrize("name", ["/etc/passwd", "../secret.jpg", "a/../../x", "C:\\x", "a\0b"])
def test_images_stay_in_their_folder(tmp_path, name):
    images = [{"id": 7, "file_name": name}, _IMAGES[1]]
    source = opened("coco", _captions(tmp_path, [_caption(1, 7, "x"), _caption(2, 8, "y")], images))
    assert rows(source)[0] == "outside root"
    assert rows(source)[1].caption == "y"


def test_links_are_refused(tmp_path):
    root = _captions(tmp_path / "set", [_caption(1, 7, "x")])
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    (root / "train2017" / "a.jpg").unlink()
    (root / "train2017" / "a.jpg").symlink_to(tmp_path / "secret.jpg")
    assert rows(opened("coco", root)) == ["outside root"]


def test_mistakes_are_named(tmp_path):
    with pytest.raises(UserError, match=r"'mine' has no folder .*/none"):
        opened("coco", tmp_path / "none")
    root = _captions(tmp_path / "set", [_caption(1, 7, "x")])
    with pytest.raises(UserError, match=r"captions_val2017\.json; .*: annotations/captions_train"):
        opened("coco", root, "valid")
    with pytest.raises(UserError, match=r"no image folder .*/nowhere") as caught:
        opened("coco", root, train_images="nowhere")
    assert caught.value.key == "data.datasets.mine.train_images"
    put(root / "annotations" / "captions_val2017.json", {"images": [], "annotation": []})
    (root / "val2017").mkdir()
    with pytest.raises(UserError, match=r"no list 'annotations'; its keys: images, annotation"):
        opened("coco", root, "valid")
    put(root / "annotations" / "captions_val2017.json", {"images": [], "annotations": []})
    with pytest.raises(UserError, match="has no samples in it"):
        opened("coco", root, "valid")
    put(
        root / "annotations" / "captions_val2017.json", {"images": [], "annotations": [{"text": 1}]}
    )
    with pytest.raises(UserError, match=r"no sample of .*annotation 1: no 'image_id'; .*: text"):
        opened("coco", root, "valid")


def test_one_id_of_two_images(tmp_path):
    images = [*_IMAGES, {"id": 7, "file_name": "a.jpg"}]
    assert len(opened("coco", _captions(tmp_path / "same", [_caption(1, 7, "x")], images))) == 1
    images[2] = {"id": 7, "file_name": "other.jpg"}
    with pytest.raises(UserError, match=r"image 3: id '7' belongs to 'a\.jpg' already"):
        opened("coco", _captions(tmp_path / "two", [_caption(1, 7, "x")], images))


def _karpathy(root, images):
    folder(root, "train2014/a.jpg", "val2014/b.jpg")
    put(root / "dataset_coco.json", {"images": images, "dataset": "coco"})
    return {"train_anno": "dataset_coco.json", "valid_anno": "dataset_coco.json"}


def _image(split, filepath, name, *captions, **more):
    sentences = [{"raw": text, "sentid": i, "tokens": []} for i, text in enumerate(captions)]
    return {"split": split, "filepath": filepath, "filename": name, "sentences": sentences, **more}


def test_karpathy_splits(tmp_path):
    images = [
        _image("train", "train2014", "a.jpg", "one", "two", cocoid=70),
        _image("restval", "val2014", "b.jpg", "three", imgid=5),
        _image("val", "val2014", "b.jpg", "four"),
        _image("test", "val2014", "b.jpg", "five"),
    ]
    options = _karpathy(tmp_path, images)
    source = opened("coco", tmp_path, **options)
    assert [source[i].caption for i in range(len(source))] == ["one", "two", "three"]
    assert [source[i].image_id for i in range(3)] == ["70", "70", "5"]
    assert image(source[1]) == tmp_path / "train2014" / "a.jpg"
    assert [r.caption for r in rows(opened("coco", tmp_path, "valid", **options))] == ["four"]
    held_out = opened("coco", tmp_path, "valid", **options, valid_splits=["test"])
    assert [r.caption for r in rows(held_out)] == ["five"]
    with pytest.raises(UserError, match=r"no split dev; its splits: restval, test, train, val"):
        opened("coco", tmp_path, "valid", **options, valid_splits=["dev"])


def test_karpathy_without_folders_and_with_faults(tmp_path):
    """Flickr's files name no folder; wrong types are bad samples."""
    good = _image("train", "", "a.jpg", "fine")
    del good["filepath"]
    images = [good, {"split": "train", "sentences": 3, "filename": "a.jpg"}, 9]
    images += [_image("train", "..", "a.jpg", "x"), _image("train", "", "a.jpg")]
    options = _karpathy(tmp_path, images)
    found = rows(opened("coco", tmp_path, **options, train_images="train2014"))
    assert image(found[0]) == tmp_path / "train2014" / "a.jpg"
    assert found[1:] == ["malformed", "malformed", "outside root", "no caption"]


def test_real_captions(shared_data, tmp_path):
    """The public CSV's captions, written as COCO's JSON, come back."""
    (tmp_path / "captions.csv").symlink_to(shared_data / "coco" / "captions_valid.csv")
    expected = rows(opened("csv", tmp_path, train_anno="captions.csv", train_images="."))
    images = {r.image_id: {"id": int(r.image_id), "file_name": r.key} for r in expected}
    annotations = [_caption(int(r.caption_id), int(r.image_id), r.caption) for r in expected]
    whole = {"images": list(images.values()), "annotations": annotations}
    (tmp_path / "captions.json").write_text(json.dumps(whole, indent=1))
    found = rows(opened("coco", tmp_path, train_anno="captions.json", train_images="."))
    assert found == expected and len(found) > 500
