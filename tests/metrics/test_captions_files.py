"""Files of captions: both forms, and every mistake told with its place."""

import json

import pytest

from engine.errors import UserError
from engine.metrics.captions_files import read

GOOD = {"id": 1, "references": ["a", "b"], "candidate": "c"}
RESULT = {"image_id": 1, "caption": "c"}


def write(path, content):
    text = content if isinstance(content, str) else json.dumps(content)
    path.write_text(text, encoding="utf8")
    return path


def test_items(tmp_path):
    found = read(write(tmp_path / "f.json", [{**GOOD, "id": "x"}, {**GOOD, "more": 1}]))
    assert found.candidates == {"x": "c", "1": "c"}
    assert found.references == {"x": ["a", "b"], "1": ["a", "b"]}


def test_coco(tmp_path):
    rows = [{"image_id": i, "caption": f"{i}{n}"} for n in "ab" for i in (1, 2)]
    annotations = write(tmp_path / "a.json", {"annotations": rows})
    found = read(write(tmp_path / "r.json", [{"image_id": "2", "caption": "c"}]), annotations)
    assert found.candidates == {"2": "c"}
    assert found.references == {"2": ["2a", "2b"]}
    assert found.num_unscored == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ({}, "holds an object; a list"),
        (3, "holds a number"),
        ([], "holds no captions"),
        ([1], "entry 0 is a number"),
        ([GOOD, GOOD], "entry 1 repeats the id 1"),
        ([GOOD, {**GOOD, "id": "1"}], "entry 1 repeats the id 1"),
        ([RESULT], "--references"),
        ([{**GOOD, "id": 1.5}], "the id is a number"),
        ([{**GOOD, "id": True}], "the id is true or false"),
        ([{"candidate": "c", "references": ["a"]}], "there is no id"),
        ([{"id": 1, "references": ["a"]}], "id 1.*there is no candidate"),
        ([{**GOOD, "candidate": None}], "id 1.*the candidate is null"),
        ([{**GOOD, "candidate": ["c"]}], "the candidate is a list"),
        ([{**GOOD, "references": []}], "references is an empty list"),
        ([{**GOOD, "references": "a"}], "references is a text"),
        ([{**GOOD, "references": ["a", None]}], "a reference is null"),
        ([{**GOOD, "references": ["a", 2]}], "a reference is a number"),
        ([{"id": 1, "candidate": "c"}], "references is null"),
    ],
)
def test_items_that_are_wrong(tmp_path, content, message):
    path = write(tmp_path / "f.json", content)
    with pytest.raises(UserError, match=message) as raised:
        read(path)
    assert str(raised.value).startswith(str(path))


@pytest.mark.parametrize(
    ("results", "annotations", "message"),
    [
        ([RESULT], [RESULT], 'a.json has no "annotations"'),
        ([RESULT], {"annotations": []}, "a.json holds no captions"),
        ([RESULT], {"annotations": [{"image_id": 1}]}, "annotation 0: there is no caption"),
        ([RESULT, RESULT], {"annotations": [RESULT]}, "entry 1 repeats image 1"),
        ([RESULT], {"annotations": [{**RESULT, "image_id": 2}]}, "image 1 has no caption in"),
        ([GOOD], {"annotations": [RESULT]}, "there is no image_id"),
    ],
)
def test_coco_files_that_are_wrong(tmp_path, results, annotations, message):
    with pytest.raises(UserError, match=message):
        read(write(tmp_path / "r.json", results), write(tmp_path / "a.json", annotations))


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read(tmp_path / "none.json")
    with pytest.raises(UserError, match="cannot be read"):
        read(tmp_path)
    (tmp_path / "latin.json").write_bytes(b'["caf\xe9"]')
    with pytest.raises(UserError, match="UTF-8"):
        read(tmp_path / "latin.json")
