"""COCO's objects are learned from one split and scored on the other."""

import csv
from pathlib import Path

from tests.bench.objects import split


def rows(path):
    with Path(path).open(encoding="utf8", newline="") as file:
        return list(csv.reader(file))


def test_images_are_told_apart_by_cocos_split(tmp_path):
    data, folder = tmp_path / "data", tmp_path / "made"
    (data / "coco").mkdir(parents=True)
    folder.mkdir()
    (data / "coco" / "images.csv").write_text(
        "image,coco2017_split\na.jpg,train2017\nb.jpg,val2017\nc.jpg,train2017\n"
    )
    (data / "coco" / "objects.csv").write_text("image,labels\na.jpg,dog|cup\nb.jpg,cat\n")
    section = split(data, folder)
    assert section["root"] == str(data / "coco") and section["format"] == "csv"
    assert rows(section["train_anno"]) == [["image", "labels"], ["a.jpg", "dog|cup"]]
    assert rows(section["valid_anno"]) == [["image", "labels"], ["b.jpg", "cat"]]
    assert section["train_images"] == section["valid_images"] == "."
