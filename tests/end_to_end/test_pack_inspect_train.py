"""Data of other people's forms: packed, inspected, trained on."""

import base64
import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.data.formats.folders import put
from tests.tools.inspect.test_inspect import cells, photograph
from tests.tools.inspect.test_inspect import run as inspect
from tests.tools.pack import packing

NUMBER = 8  # images
TINY = Path(__file__).with_name("tiny.yaml")


def _images(folder, pattern="{}.jpg"):
    folder.mkdir(parents=True)
    for i in range(NUMBER):
        photograph(i).save(folder / pattern.format(i))


def llava(root):
    _images(root / "train")
    asked = {"from": "human", "value": "<image>\nWhat do you see?"}
    more = [{"from": "human", "value": "More?"}, {"from": "gpt", "value": "No | nothing."}]
    rows = [
        {"id": str(i), "image": f"{i}.jpg",
         "conversations": [asked, {"from": "gpt", "value": f"Scene {i}."}, *more]}
        for i in range(NUMBER)
    ]  # fmt: skip
    put(root / "train.json", rows)


def vqa(root):
    _images(root / "train2014", "COCO_train2014_{:012d}.jpg")
    asked = [
        {"question_id": 10 * i + j, "image_id": i, "question": f"Is it {j}?"}
        for i in range(NUMBER)
        for j in range(2)
    ]
    told = [
        {"question_id": q["question_id"], "answers": [{"answer": a} for a in ("yes", "no", "no")]}
        for q in asked
    ]
    put(root / "v2_OpenEnded_mscoco_train2014_questions.json", {"questions": asked})
    put(root / "v2_mscoco_train2014_annotations.json", {"annotations": told})


def coco(root):
    _images(root / "train2017", "{:012d}.jpg")
    images = [{"id": i, "file_name": f"{i:012d}.jpg"} for i in range(NUMBER)]
    said = [  # as COCO's own file: not image after image
        {"id": 100 * c + i, "image_id": i, "caption": f"Picture {i}, seen for time {c}."}
        for c in range(3)
        for i in range(NUMBER)
    ]
    put(root / "annotations" / "captions_train2017.json", {"images": images, "annotations": said})


def m3it(root):
    _images(root / "images")
    rows = []
    for i in range(NUMBER):
        image = base64.b64encode((root / "images" / f"{i}.jpg").read_bytes()).decode()
        told = {"instruction": "Describe the image.", "inputs": "", "outputs": f"It shows {i}."}
        rows.append({**told, "image_base64_str": [image]})
    put(root / "train.jsonl", rows)


FORMS = {"llava": (llava, 8, 4), "vqa": (vqa, 16, 2), "coco": (coco, 24, 0), "m3it": (m3it, 8, 2)}


def _training(form="webdataset", root="packed"):
    return [
        f"data.datasets.packed={{format: {form}, root: {root}}}",
        "data.train_name=[packed]",
        "data.valid_name=[]",
        "data.train_steps=1",
        "data.batch_size=8",
        "epoch=1",
    ]


@pytest.mark.parametrize("form", FORMS)
def test_other_forms(form, launch, tmp_path):
    make, samples, turns = FORMS[form]
    launch.data = tmp_path
    make(tmp_path / "theirs")
    printed = packing.run(
        tmp_path / "theirs", tmp_path / "packed", "--to=webdataset", f"--format={form}"
    )
    assert f"train: {samples} samples, " in printed and "left out" not in printed
    wanted, found = (
        packing.records(tmp_path / root, name)
        for root, name in (("theirs", form), ("packed", "webdataset"))
    )
    assert len(found) == samples and sorted(map(repr, found)) == sorted(map(repr, wanted))
    settings = [f"data.data_path={tmp_path}", f"ckpt.dir={launch.output}", *_training()]
    told = inspect(TINY, *settings, "--split=train", "--output", tmp_path / "told")
    assert cells(told, "samples") == [str(samples)] and "bad" not in told
    assert (f"{turns}.0 / {turns} / 0.0" in told) == bool(turns)
    launch(*_training())
    assert len(launch.losses()) == 1 and np.isfinite(launch.losses()).all()


def test_joined_captions_of_coco(launch, tmp_path):
    """The packer of the reference: all captions of an image as one text."""
    launch.data = tmp_path
    coco(tmp_path / "theirs")
    flags = ("--format=coco", "--captions=joined")
    packing.run(tmp_path / "theirs", tmp_path / "packed", "--to=csv", *flags)
    rows = packing.records(tmp_path / "packed", "csv")
    times = " ".join(f"Picture 3, seen for time {c}." for c in range(3))
    assert len(rows) == NUMBER and rows[3][1] == times
    launch(*_training("csv"))
    assert len(launch.losses()) == 1


def _same_runs(launch, files, packed):
    """Loss curves and weights of the two forms."""
    common = ["data.train_name=[real]", "data.valid_name=[]", "data.batch_size=16", "epoch=2"]
    for name, options in (("files", files), ("packed", packed)):
        dataset = f"data.datasets.real={json.dumps(options)}"
        launch(*common, dataset, f"--exp_name={name}")
    losses = launch.losses("files")
    assert len(losses) > 4 and launch.losses("packed") == losses
    steps = len(losses)
    assert launch.weights(steps, "files") == launch.weights(steps, "packed")


def test_photographs_train_alike_from_files_and_shards(launch, tmp_path, shared_data):
    """Flickr8k: the same samples in the same order, the same bits in every batch."""
    real = shared_data / "flickr8k"
    root = tmp_path / "flickr"
    root.mkdir()
    (root / "train").symlink_to(real / "train")
    with (real / "train_anno.csv").open(newline="", encoding="utf8") as file:
        rows = list(csv.reader(file))[: 1 + 60]
    with (root / "train_anno.csv").open("w", newline="", encoding="utf8") as file:
        csv.writer(file).writerows(rows)
    printed = packing.run(root, tmp_path / "packed", "--to=webdataset", "--shard-size=5")
    assert "train: 60 samples, 12 images" in printed and "in 3 shards" in printed
    _same_runs(
        launch,
        {"format": "csv", "root": str(root)},
        {"format": "webdataset", "root": str(tmp_path / "packed")},
    )


def test_a_folder_of_side_cars_trains_as_it_is(launch, tmp_path):
    launch.data = tmp_path
    _images(tmp_path / "packed")
    for i in range(NUMBER):
        (tmp_path / "packed" / f"{i}.txt").write_text(f"photograph {i}")
    launch(*_training("sidecar"))
    with Image.open(tmp_path / "packed" / "0.jpg") as image:
        assert image.size == (96, 64)
    assert len(launch.losses()) == 1
