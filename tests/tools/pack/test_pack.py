"""Datasets packed into shards and into the CSV folder form, and back."""

import csv
import hashlib
import json
import tarfile

import pytest

from engine.config.schema import Data
from engine.data.sources import open_source
from tests.data.formats.folders import put
from tests.data.tar.tar_files import picture
from tests.tools.pack.packing import csv_folder, digests, records, run, write_rows


def test_csv_to_shards_to_csv(tmp_path):
    source = csv_folder(tmp_path / "a", captions=3)
    first = run(source, tmp_path / "b", "--to=webdataset", "--shard-size=3")
    assert "train: 21 samples, 7 images" in first and "in 3 shards" in first
    back = run(tmp_path / "b", tmp_path / "c", "--to=csv")
    again = run(tmp_path / "c", tmp_path / "d", "--to=webdataset")
    assert digests(first) == digests(back) == digests(again)
    wanted = records(source, "csv")
    assert len(wanted) == 21
    assert records(tmp_path / "b", "webdataset") == wanted
    assert records(tmp_path / "c", "csv") == wanted
    assert records(tmp_path / "d", "webdataset") == wanted


def test_shards_are_in_the_form_of_img2dataset(tmp_path):
    source = csv_folder(tmp_path / "a", captions=2)
    run(source, tmp_path / "b", "--to=webdataset", "--shard-size=3")
    folder = tmp_path / "b" / "train"
    assert sorted(path.name for path in folder.glob("0*")) == [
        f"0000{shard}{end}" for shard in range(3) for end in (".tar", "_stats.json")
    ]
    with tarfile.open(folder / "00000.tar") as tar:
        assert tar.getnames()[:3] == ["000000.jpg", "000000.json", "000000.txt"]
        assert "000002.png" in tar.getnames()
        assert tar.extractfile("000001.jpg").read() == (source / "train" / "1.jpg").read_bytes()
        fields = json.load(tar.extractfile("000001.json"))
        text = tar.extractfile("000001.txt").read().decode()
    assert fields["caption_ids"] == ["10", "11"] and fields["image_id"] == "id1"
    assert fields["source"] == "1.jpg" and len(fields["captions"]) == 2
    assert text == 'caption 0 of "1", said in two lines\ncaption 1 of "1", said in two lines'
    stats = json.loads((folder / "00002_stats.json").read_text())
    assert (stats["count"], stats["successes"], stats["status_dict"]) == (1, 1, {"success": 1})
    shard = (folder / "00002.tar").read_bytes()
    assert stats["packed"]["sha256"] == hashlib.sha256(shard).hexdigest()
    assert stats["packed"]["bytes"] == len(shard)


def test_rows_of_an_image_come_together(tmp_path):
    source = csv_folder(tmp_path / "a", number=3)
    rows = [("1.jpg", 1, "a", 0), ("0.jpg", 0, "b", 1), ("1.jpg", 1, "c", 2), ("0.jpg", 0, "d", 3)]
    write_rows(source / "train_anno.csv", rows)
    assert "4 samples, 2 images" in run(source, tmp_path / "b", "--to=webdataset")
    assert [record[1] for record in records(tmp_path / "b", "webdataset")] == ["a", "c", "b", "d"]


@pytest.mark.parametrize("to", ["webdataset", "csv"])
@pytest.mark.parametrize(
    ("captions", "first"), [("joined", "caption 0 caption 1"), ("first", "caption 0")]
)
def test_one_caption_an_image(tmp_path, to, captions, first):
    source = csv_folder(tmp_path / "a", number=3)
    rows = [(f"{i % 2}.jpg", i % 2, f"caption {i // 2}", i) for i in range(4)]
    write_rows(source / "train_anno.csv", rows)
    printed = run(source, tmp_path / "b", f"--to={to}", f"--captions={captions}")
    assert "train: 2 samples, 2 images" in printed
    assert [record[1] for record in records(tmp_path / "b", to)] == [first, first]


def test_bad_samples_are_left_out_named_and_counted(tmp_path):
    source = csv_folder(tmp_path / "a", number=8)
    (source / "train" / "1.jpg").unlink()
    (source / "train" / "3.jpg").write_bytes(b"<html>not found</html>")
    (source / "train" / "4.jpg").write_bytes(b"")
    with (source / "train_anno.csv").open("a", newline="") as file:
        csv.writer(file).writerow(("0.jpg", "id0", " ", "99"))
    printed = run(source, tmp_path / "b", "--to=webdataset", "--shard-size=3")
    assert "train: 5 samples, 5 images" in printed and "left out 4: " in printed
    for told in ("1 missing", "1 not an image", "1 empty file", "1 no caption", "a 1.jpg"):
        assert told in printed
    lines = (tmp_path / "b" / "train" / "bad_samples.jsonl").read_text().splitlines()
    assert sorted((r := json.loads(line))["index"] for line in lines) == [1, 3, 4, 8]
    assert r.keys() == {"step", "dataset", "index", "key", "cause", "detail"}
    kept = [record[2] for record in records(tmp_path / "b", "webdataset")]
    assert kept == ["id0", "id2", "id5", "id6", "id7"]
    assert run(source, tmp_path / "b", "--to=webdataset", "--shard-size=3").count("left out 4") == 1


def test_endings_are_those_of_the_bytes(tmp_path):
    source = csv_folder(tmp_path / "a", number=2)
    (source / "train" / "1.jpg").write_bytes(
        (csv_folder(tmp_path / "x") / "train/sub/2.png").read_bytes()
    )
    run(source, tmp_path / "b", "--to=csv")
    names = sorted(path.name for path in (tmp_path / "b" / "train" / "00000").iterdir())
    assert names == ["000000000.jpg", "000000001.png"]


def test_questions_answers_and_labels_stay(tmp_path):
    source = csv_folder(tmp_path / "a", number=3)
    header = ("image", "image_id", "question", "answers", "labels", "question_type", "answer_type")
    rows = [
        ("0.jpg", 0, "What?", "cat|cat|dog", "cat|animal", "what", "other"),
        ("0.jpg", 0, "How many?", "2", "", "how many", ""),
        ("1.jpg", 1, "Why?", "", "dog", "", "number"),
    ]
    write_rows(source / "train_anno.csv", rows, header)
    wanted = records(source, "csv")
    assert wanted[0][4] == (("human", "What?"), ("gpt", "cat")) and wanted[2][4] != ()
    first = run(source, tmp_path / "b", "--to=webdataset")
    assert records(tmp_path / "b", "webdataset") == wanted
    back = run(tmp_path / "b", tmp_path / "c", "--to=csv")
    assert records(tmp_path / "c", "csv") == wanted
    assert digests(first) == digests(back)
    assert len(list((tmp_path / "c" / "train").rglob("*.jpg"))) == 2  # each image once


def _conversations(root):
    (root / "train").mkdir(parents=True)
    (root / "train" / "a.jpg").write_bytes(picture(1))
    turns = [
        ("human", "<image>\nWhat?"),
        ("gpt", "A cat | dog."),
        ("human", "Sure?"),
        ("gpt", "No"),
    ]
    said = [{"from": who, "value": text} for who, text in turns]
    put(
        root / "train.json",
        [
            {"id": "1", "image": "a.jpg", "conversations": said},
            {"id": "2", "conversations": said[2:]},
        ],
    )
    return root


def test_conversations_stay_in_shards(tmp_path):
    source = _conversations(tmp_path / "a")
    printed = run(source, tmp_path / "b", "--to=webdataset", "--format=llava")
    assert "2 samples, 1 image" in printed
    wanted = records(source, "llava")
    assert len(wanted[0][4]) == 4 and wanted[1][0] is None
    assert records(tmp_path / "b", "webdataset") == wanted


def test_only_samples_of_one_image_are_packed(tmp_path):
    root = _conversations(tmp_path / "a")
    samples = json.loads((root / "train.json").read_text())
    put(root / "train.json", [{**samples[0], "image": ["a.jpg", "a.jpg"]}, *samples])
    (tmp_path / "c.yaml").write_text(
        f"data: {{data_path: {tmp_path}, datasets: {{a: {{format: llava, several_images: all}}}}}}"
    )
    for to in ("webdataset", "csv"):
        printed = run("a", tmp_path / to, f"--cfg={tmp_path / 'c.yaml'}", f"--to={to}")
        assert "1 several images" in printed


def test_what_csv_has_no_place_for_is_said(tmp_path):
    source = _conversations(tmp_path / "a")
    printed = run(source, tmp_path / "b", "--to=csv", "--format=llava")
    assert "of 1 samples the caption is kept, but not all else: CSV" in printed
    assert "left out 1: 1 no image" in printed
    assert [record[1] for record in records(tmp_path / "b", "csv")] == ["A cat | dog."]


def test_class_folders_keep_their_numbers_in_shards(tmp_path):
    for number, name in enumerate(("cat", "old_dog")):
        (tmp_path / "a" / "train" / name).mkdir(parents=True)
        (tmp_path / "a" / "train" / name / "1.jpg").write_bytes(picture(number))
    run(tmp_path / "a", tmp_path / "b", "--to=webdataset", "--format=imagefolder")
    data = Data(datasets={"it": {"format": "webdataset", "root": str(tmp_path / "b")}})
    source = open_source("it", "train", data, key="test")
    assert [(r.caption, r.label, r.labels) for r in (source[0], source[1])] == [
        ("cat", 0, ("cat",)),
        ("old dog", 1, ("old_dog",)),
    ]
    printed = run(tmp_path / "a", tmp_path / "c", "--to=csv", "--format=imagefolder")
    assert "of 2 samples the caption is kept" in printed


def test_side_cars_are_noticed_and_divided(tmp_path):
    folder = tmp_path / "bare"
    folder.mkdir()
    for i in range(60):
        (folder / f"{i}.jpg").write_bytes(picture(i))
        (folder / f"{i}.txt").write_text(f"number {i}")
    printed = run(folder, tmp_path / "b", "--to=csv", "--valid-share=0.25")
    assert len(digests(printed)) == 2
    train, valid = (records(tmp_path / "b", "csv", split) for split in ("train", "valid"))
    assert len(train) + len(valid) == 60 and 5 <= len(valid) <= 25
    captions = {record[1] for record in train + valid}
    assert captions == {f"number {i}" for i in range(60)}
    assert (tmp_path / "b" / "valid_anno.csv").is_file()


def test_a_dataset_of_a_configuration(tmp_path):
    csv_folder(tmp_path / "files", split="valid")
    (tmp_path / "run.yaml").write_text(
        f"data: {{data_path: {tmp_path}, train_name: [web], "
        "datasets: {web: {format: csv, root: files, cap: 3}}}\n"
    )
    cfg = f"--cfg={tmp_path / 'run.yaml'}"
    printed = run("web", tmp_path / "b", "--to=webdataset", cfg, "--split=valid")
    assert "valid: 7 samples" in printed
    (tmp_path / "files" / "valid_anno.csv").rename(tmp_path / "files" / "other.csv")
    run("web", tmp_path / "c", "--to=csv", cfg, "--split=valid", "--option=valid_anno=other.csv")
