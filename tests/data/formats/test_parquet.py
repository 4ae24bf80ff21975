"""Parquet tables: images in every form, columns under many names, files that are no tables."""

import base64
import json
import os
import pickle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from engine.errors import UserError
from tests.data.formats.folders import folder, image, images, opened, picture, rows

_STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def _write(path, metadata=None, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    made = pa.table(columns)
    pq.write_table(made.replace_schema_metadata(metadata), path, row_group_size=3)
    return path


def _structs(*cells):
    return pa.array([{"bytes": data, "path": path} for data, path in cells], _STRUCT)


@pytest.mark.parametrize(
    ("name", "cells"),
    [
        ("jpg", pa.array([picture(i) for i in range(7)])),
        ("image_bytes", pa.array([picture(i) for i in range(7)], pa.large_binary())),
        ("image", _structs(*((picture(i), "image.png") for i in range(7)))),
        ("images", pa.array([[{"bytes": picture(i), "path": None}] for i in range(7)])),
        ("image_base64_str", pa.array([base64.b64encode(picture(i)).decode() for i in range(7)])),
        ("image_base64_str", pa.array([[base64.b64encode(picture(i)).decode()] for i in range(7)])),
    ],
)
def test_images_in_the_table(tmp_path, name, cells):
    texts = [f"text {i}" for i in range(7)]
    _write(tmp_path / "train.parquet", **{"score": [1.5] * 7, name: cells, "text": texts})
    source = opened("parquet", tmp_path)
    found = rows(source)
    assert [image(r) for r in found] == [picture(i) for i in range(7)]
    assert [r.caption for r in found] == texts
    # Cells may name every image alike: each is an image of its own all the same.
    assert len({r.image_id for r in found}) == 7
    assert rows(pickle.loads(pickle.dumps(source))) == found


def test_paths(tmp_path):
    folder(tmp_path, "pictures/a.png", "pictures/b.png")
    names = ["a.png", "b.png", "../secret.png", None]
    _write(tmp_path / "train.parquet", filepath=names, title=["x", "y", "z", "w"])
    found = rows(opened("parquet", tmp_path, images="pictures"))
    assert [image(r) for r in found[:2]] == [tmp_path / "pictures" / n for n in names[:2]]
    assert found[2] == "outside root" and image(found[3]) is None
    with pytest.raises(UserError, match=r"no image folder .*/nowhere"):
        opened("parquet", tmp_path, images="nowhere")


def test_structs_without_bytes_are_paths(tmp_path):
    folder(tmp_path, "a.png")
    cells = _structs((None, "a.png"), (picture(5), None), (None, None))
    _write(tmp_path / "train.parquet", image=cells, caption=["x", "y", "z"])
    found = rows(opened("parquet", tmp_path))
    assert [image(r) for r in found] == [tmp_path / "a.png", picture(5), None]


def test_several_images(tmp_path):
    folder(tmp_path, "a.png", "b.png")
    text = base64.b64encode(picture(7)).decode()
    cells = {
        "paths": ("image", pa.array([["a.png", "b.png"], ["b.png"], []])),
        "bytes": ("image", pa.array([[picture(0), picture(1)], [picture(1)], []])),
        "structs": ("images", pa.array([[{"bytes": picture(n)} for n in (0, 1)],
                                        [{"bytes": picture(1)}], None])),
        "texts": ("image_base64_str", pa.array([[text, text], [text], []])),
    }  # fmt: skip
    for form, (name, column) in cells.items():
        _write(tmp_path / f"{form}.parquet", **{name: column, "caption": ["x"] * 3})
        options = {"train": f"{form}.parquet"}
        every = rows(opened("parquet", tmp_path, several_images="all", **options))
        assert [len(r.images) for r in every] == [2, 1, 0]
        assert image(every[2]) is None
        first = rows(opened("parquet", tmp_path, **options))
        assert [image(r) for r in first] == [image(r) for r in every]
        assert not any(r.images[1:] for r in first)
        one, *_ = rows(opened("parquet", tmp_path, several_images="refuse", **options))
        assert one == "several images"
        expected = {"paths": tmp_path / "b.png", "texts": picture(7)}.get(form, picture(1))
        assert images(every[0])[1:] == [expected]


def test_base64_under_a_plain_name(tmp_path):
    text = base64.b64encode(picture(3)).decode()
    texts = ["data:image/png;base64," + text, text, "a"]
    _write(tmp_path / "train.parquet", image=texts, caption=["x", "y", "z"])
    found = rows(opened("parquet", tmp_path, base64=True))
    assert [image(r) for r in found[:2]] == [picture(3)] * 2 and found[2] == "corrupt"


def test_several_captions_of_an_image(tmp_path):
    cells = [picture(0), picture(1)]
    _write(tmp_path / "train.parquet", image=cells, captions=[["a", "b"], ["c"]], image_id=[5, 6])
    source = opened("parquet", tmp_path)
    assert [(r.image_id, r.caption) for r in rows(source)] == [("5", "a"), ("5", "b"), ("6", "c")]
    assert [image(r) for r in rows(source)] == [cells[0], cells[0], cells[1]]


def test_questions_conversations_instructions_and_classes(tmp_path):
    images = [picture(0)]
    _write(tmp_path / "q.parquet", image=images, question=["Q?"], answers=[["b", "a", "a"]])
    (record,) = rows(opened("parquet", tmp_path, train="q.parquet"))
    assert record.turns == (("human", "Q?"), ("gpt", "a")) and record.answers == ("b", "a", "a")
    talk = [[{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]]
    _write(tmp_path / "c.parquet", conversations=talk)
    (record,) = rows(opened("parquet", tmp_path, train="c.parquet"))
    assert record.turns == (("human", "hi"), ("gpt", "ho")) and image(record) is None
    _write(tmp_path / "i.parquet", image=images, instruction=["Do"], inputs=["it"], outputs=["ok"])
    (record,) = rows(opened("parquet", tmp_path, train="i.parquet"))
    assert record.turns == (("human", "Do\nit"), ("gpt", "ok"))
    features = {"info": {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}
    metadata = {"huggingface": json.dumps(features)}
    _write(tmp_path / "l.parquet", metadata, image=images * 2, label=[1, 0])
    first, second = rows(opened("parquet", tmp_path, train="l.parquet"))
    assert (first.label, first.labels, first.caption) == (1, ("dog",), "dog")
    assert second.label == 0


def test_named_columns_and_categories(tmp_path):
    captions = pa.array(["one", "two", "one"]).dictionary_encode()
    _write(tmp_path / "val.parquet", photo=[picture(i) for i in range(3)], alt=captions)
    columns = {"image": "photo", "caption": "alt"}
    found = rows(opened("parquet", tmp_path, "valid", columns=columns))
    assert [r.caption for r in found] == ["one", "two", "one"]


def test_many_files_in_order(tmp_path):
    for number in range(3):
        cells = [picture(10 * number + i) for i in range(4)]
        path = tmp_path / "data" / f"train-{number}.parquet"
        _write(path, image=cells, caption=[f"{number} {i}" for i in range(4)])
    source = opened("parquet", tmp_path, train="data/train-*.parquet")
    assert [source[i].caption for i in (0, 5, 11)] == ["0 0", "1 1", "2 3"]
    assert [image(source[i]) for i in (0, 5, 11)] == [picture(0), picture(11), picture(23)]
    _write(tmp_path / "data" / "train-3.parquet", image=[picture(1)], text=["other"])
    with pytest.raises(UserError, match=r"train-3\.parquet has no column 'caption'"):
        opened("parquet", tmp_path, train="data/train-*.parquet")


def test_copied_once_until_the_file_changes(tmp_path):
    path = _write(tmp_path / "train.parquet", image=[picture(0)], caption=["old"])
    opened("parquet", tmp_path)
    kept = {p: p.stat().st_mtime_ns for p in (tmp_path / ".engine_cache").iterdir()}
    opened("parquet", tmp_path)
    assert kept == {p: p.stat().st_mtime_ns for p in (tmp_path / ".engine_cache").iterdir()}
    _write(path, image=[picture(1)], caption=["newer"])
    os.utime(path, ns=(1, 1))
    (record,) = rows(opened("parquet", tmp_path))
    assert (image(record), record.caption) == (picture(1), "newer")
    assert len(list((tmp_path / ".engine_cache").glob("*.arrows"))) == 1


def test_cells_of_other_types(tmp_path):
    _write(tmp_path / "train.parquet", image=[picture(0)] * 2, caption=["x", None])
    assert rows(opened("parquet", tmp_path))[1] == "malformed"
    _write(tmp_path / "train.parquet", image=[1, 2], caption=["x", "y"])
    with pytest.raises(UserError, match=r"images of .* are of type int64, not bytes, texts or"):
        opened("parquet", tmp_path)
    _write(tmp_path / "train.parquet", image=[picture(0)], caption=[7.5])
    with pytest.raises(UserError, match=r"no sample of .* the caption is 7\.5, not a text"):
        opened("parquet", tmp_path)


def test_mistakes_are_named(tmp_path):
    with pytest.raises(UserError, match=r"no files train\*\.parquet in .*: none"):
        opened("parquet", tmp_path)
    (tmp_path / "train.parquet").write_bytes(b"PAR1 is not enough PAR1")
    with pytest.raises(UserError, match=r"cannot read .*train\.parquet as Parquet"):
        opened("parquet", tmp_path)
    _write(tmp_path / "train.parquet", url=["x"], alt=["y"])
    with pytest.raises(
        UserError, match=r"none of the columns caption, .*its columns are: url, alt"
    ):
        opened("parquet", tmp_path)
    _write(tmp_path / "train.parquet", url=["x"], caption=["y"])
    with pytest.raises(UserError, match=r"no column for the image .*: url, caption"):
        opened("parquet", tmp_path)
    with pytest.raises(UserError, match=r"no column for the image \(picture\); its col"):
        opened("parquet", tmp_path, columns={"image": "picture"})


def test_a_torn_file(tmp_path):
    path = _write(tmp_path / "train.parquet", image=[picture(0)] * 50, caption=["words"] * 50)
    data = path.read_bytes()
    path.write_bytes(data[:20] + bytes(200) + data[220:])
    with pytest.raises(UserError, match=r"train\.parquet"):
        opened("parquet", tmp_path)
    assert not list((tmp_path / ".engine_cache").glob("[!.]*"))
