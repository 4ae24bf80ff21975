"""Lists of labels and COCO's detection labels as rows."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from engine.config.schema import Data
from engine.data.sources import open_source
from engine.errors import UserError
from engine.types import BadSample
from tests.data.formats.folders import image

DETECTION = {
    "categories": [{"id": 1, "name": "person"}, {"id": 18, "name": "dog"}],
    "annotations": [
        {"image_id": 7, "category_id": 18}, {"image_id": 7, "category_id": 1, "iscrowd": 1},
        {"image_id": 7, "category_id": 18}, {"image_id": 9, "category_id": 99},
        {"category_id": 1}, "nonsense",
    ],
    "images": [
        {"id": 7, "file_name": "a.jpg"}, {"id": 8, "file_name": "b.jpg"},
        {"id": 9, "file_name": "c.jpg"}, {"id": 10},
    ],
}  # fmt: skip
LISTED = [
    {"image": "a.jpg", "labels": ["dog", "traffic light"], "image_id": 5},
    {"image": "b.jpg", "labels": "cat|dog"}, {"image": "c.jpg", "labels": []},
    {"image": "d.jpg", "labels": [3]}, {"image": "e.jpg"},
]  # fmt: skip


def opened(root: Path, anno: str):
    (root / "images").mkdir(exist_ok=True)
    options = {"format": "objects", "root": str(root), "train_anno": anno, "train_images": "images"}
    return open_source("set", "train", Data(datasets={"set": options}), key="k")


def rows(source) -> list:
    found = []
    for number in range(len(source)):
        try:
            record = source[number]
            found.append((record.key, record.image_id, record.labels, record.caption))
        except BadSample as bad:
            found.append(bad.cause)
    return found


@pytest.mark.parametrize("packed", [False, True])
def test_boxes_are_kinds_once_an_image(tmp_path: Path, packed: bool) -> None:
    text = json.dumps(DETECTION).encode()
    (tmp_path / f"i.json{'.gz' * packed}").write_bytes(gzip.compress(text) if packed else text)
    source = opened(tmp_path, "i.json")
    assert rows(source) == [
        ("a.jpg", "7", ("dog", "person"), "dog, person"), "no label", "no label", "malformed",
    ]  # fmt: skip
    assert image(source[0]) == tmp_path / "images" / "a.jpg"


@pytest.mark.parametrize("form", ["list.json", "lines.jsonl"])
def test_lists_of_labels(tmp_path: Path, form: str) -> None:
    text = json.dumps(LISTED)
    if form.endswith("l"):
        text = "\n".join(map(json.dumps, LISTED)) + "\n{broken\n"
    (tmp_path / form).write_text(text)
    want = [
        ("a.jpg", "5", ("dog", "traffic light"), "dog, traffic light"),
        ("b.jpg", "b.jpg", ("cat", "dog"), "cat, dog"), "no label", "malformed", "malformed",
    ]  # fmt: skip
    assert rows(opened(tmp_path, form)) == want + ["malformed"] * form.endswith("l")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", "is empty"), ("[", "entry 1"), ("{}", "no"), ("[]", "has no samples"),
        ('{"categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}',
         "id '1' belongs to 'a' already"),
        ('{"categories": [{"id": 1}]}', "category 1: malformed: no 'name'; its keys: id"),
    ],
)  # fmt: skip
def test_files_that_are_something_else_are_named(tmp_path: Path, content: str, told: str) -> None:
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(UserError, match=told):
        opened(tmp_path, "x.json")
