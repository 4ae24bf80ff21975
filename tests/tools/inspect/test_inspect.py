"""What is told of a configuration's data."""

import csv
import io
import json
import re
import statistics
from contextlib import redirect_stderr, redirect_stdout
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image, ImageFilter

from engine.errors import exit_code
from engine.tools.inspect import __main__ as inspect
from engine.tools.inspect.report import figures
from tests.data.formats.folders import put

ROWS = {"train": 40, "valid": 10}


def photograph(seed, size=(96, 64)):
    """Smooth colours, unlike those of any other seed."""
    coarse = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
    return image.filter(ImageFilter.SMOOTH)


def run(*argv, code=0):
    """What the command prints."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        found = exit_code(lambda: inspect.main([*map(str, argv), "--jobs=1"]))
    assert found == code, out.getvalue() + err.getvalue()
    return out.getvalue() + err.getvalue()


def cells(printed, name):
    """The values of a row of the table printed."""
    lines = [line for line in printed.splitlines() if line.startswith("│")]
    row = next(line for line in lines if line.split("│")[1].strip().startswith(name))
    return [cell.strip() for cell in row.strip("│").split("│")[1:]]


@pytest.fixture(autouse=True)
def _wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def cfg(tmp_path):
    """A CSV dataset with a copy across its splits, one within, and three bad samples."""
    root = tmp_path / "mine"
    for seed, (split, number) in enumerate(ROWS.items()):
        (root / split).mkdir(parents=True)
        rows = []
        for i in range(number):
            photograph(1000 * seed + i, (96, 64 + i)).save(root / split / f"{i}.jpg", quality=92)
            rows += [(f"{i}.jpg", i, "word " * (1 + i % 4), 2 * i + c) for c in range(2)]
        with (root / f"{split}_anno.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("image", "image_id", "caption", "caption_id"), *rows])
    photograph(3).resize((200, 140)).save(root / "valid" / "5.jpg", quality=60)
    photograph(7).save(root / "train" / "9.jpg", quality=50)
    (root / "train" / "11.jpg").unlink()
    whole = (root / "train" / "12.jpg").read_bytes()
    (root / "train" / "12.jpg").write_bytes(whole[: len(whole) // 2])
    (root / "valid" / "1.jpg").write_text("<html>")
    data = {"data_path": str(tmp_path), "train_name": ["mine"], "valid_name": ["mine"]}
    encoder = {"config": {"model_type": "bert"}, "max_length": 17, "tokenizer": {"name": "bytes"}}
    path = tmp_path / "run.yaml"
    model = {"text_encoder": encoder}
    path.write_text(json.dumps({"data": data, "model": model, "ckpt": {"dir": str(tmp_path)}}))
    return path


def test_counts_and_figures(cfg):
    printed = run(cfg)
    assert cells(printed, "samples") == ["80", "20"]
    assert cells(printed, "images") == ["38", "9"]
    assert cells(printed, "bad samples") == ["4", "2"]
    heights = [64 + i for i in range(40) if i not in (9, 11, 12)] + [64]
    told = f"{statistics.mean(heights):.1f} / {statistics.median(heights):g}"
    assert cells(printed, "height")[0] == f"{told} / {statistics.pstdev(heights):.1f}"
    # a byte a letter of the words and the spaces between them, begin and end
    tokens = [2 + 5 * (1 + i % 4) - 1 for i in range(40) if i not in (11, 12) for _ in range(2)]
    told = f"{statistics.mean(tokens):.1f} / {statistics.median(tokens):g}"
    assert cells(printed, "tokens a caption")[0] == f"{told} / {statistics.pstdev(tokens):.1f}"
    longer = 100 * sum(t > 17 for t in tokens) / len(tokens)
    assert cells(printed, "longer than 17 tokens")[0] == f"{longer:.1f} %"
    assert cells(printed, "captions an image") == ["2.0 / 2 / 0.0", "2.0 / 2 / 0.0"]


def test_copies_across_and_within_splits_are_named(cfg, tmp_path):
    printed = run(cfg)
    assert "1 images are in both train and valid:\n  mine train 3.jpg = mine valid 5.jpg" in printed
    assert "more than once in a split:\n  mine train 7.jpg = mine train 9.jpg" in printed
    assert cells(printed, "copies") == ["1", "0"]
    lines = (tmp_path / "run" / "inspect" / "copies.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        [["mine train", "3.jpg"], ["mine valid", "5.jpg"]],
        [["mine train", "7.jpg"], ["mine train", "9.jpg"]],
    ]


def test_bad_samples_are_named_by_cause(cfg, tmp_path):
    printed = run(cfg)
    for told in (
        "mine train: 2 bad, missing: 11.jpg, 11.jpg",
        "mine train: 2 bad, truncated: 12.jpg, 12.jpg",
        "mine valid: 2 bad, not an image: 1.jpg, 1.jpg",
    ):
        assert told in printed
    lines = (tmp_path / "run" / "inspect" / "bad_samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["index"] for line in lines] == [22, 23, 24, 25, 2, 3]
    assert cells(run(cfg, "data.max_caption_chars=10"), "bad samples")[0] == "42"


class _Links(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found = []
        self.tags = set()

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.found += [v for name, v in attributes if name in ("src", "href", "srcset")]


def test_the_page_stands_alone(cfg, tmp_path):
    run(cfg, "--output", tmp_path / "told")
    page = (tmp_path / "told" / "inspect.html").read_text(encoding="utf8")
    links = _Links()
    links.feed(page)
    assert len(links.found) == 24 - 1 + 9  # one of those to be shown cannot be read
    assert all(link.startswith("data:image/jpeg;base64,") for link in links.found)
    assert not links.tags & {"script", "link", "iframe"} and "url(" not in page
    assert "default-src 'none'" in page and page.count("<svg") == 4
    for told in ("mine train 3.jpg = mine valid 5.jpg", "truncated", "word word word"):
        assert told in page


def test_contact_sheets(cfg, tmp_path):
    run(cfg)
    with Image.open(tmp_path / "run" / "inspect" / "sheet_mine_train.png") as sheet:
        pixels = np.asarray(sheet.convert("RGB"))
    assert pixels.shape[0] > 4 * 200 and pixels.shape[1] > 6 * 200
    assert pixels[250:800, 100:1100].std() > 30  # photographs, not a white page
    assert not list((tmp_path / "run" / "inspect").glob(".*"))


def test_a_part_of_the_data(cfg):
    printed = run(cfg, "--split=train", "--limit=10")
    assert cells(printed, "samples") == ["20"] and cells(printed, "of samples in all") == ["80"]


@pytest.mark.slow
def test_several_processes_find_the_same(cfg, tmp_path):
    one = run(cfg, "--output", tmp_path / "a")
    with redirect_stdout(io.StringIO()) as out:
        inspect.main([str(cfg), "--output", str(tmp_path / "b"), "--jobs=2"])
    assert out.getvalue().splitlines()[:-1] == one.splitlines()[:-1]
    for name in ("inspect.html", "copies.jsonl", "bad_samples.jsonl", "sheet_mine_train.png"):
        a, b = ((tmp_path / each / name).read_bytes() for each in "ab")
        assert re.sub(rb" at 0x\w+", b"", a) == re.sub(rb" at 0x\w+", b"", b), name


def test_conversations_answers_and_labels_are_shown(cfg, tmp_path):
    turns = [{"from": "human", "value": "<image>\nWhat <b>?"}, {"from": "gpt", "value": "A cat."}]
    put(tmp_path / "mine" / "train.json", [{"image": "0.jpg", "conversations": turns}] * 3)
    rows = [("1.jpg", "How many?", "two|two|2", "cat|dog")]
    with (tmp_path / "mine" / "asked.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("image", "question", "answers", "labels"), *rows])
    printed = run(
        cfg,
        "--split=train",
        "data.train_name=[talk,asked]",
        "data.datasets.talk={format: llava, root: mine}",
        "data.datasets.asked={format: csv, root: mine, train_anno: asked.csv}",
    )
    assert cells(printed, "turns a conversation") == ["2.0 / 2 / 0.0", "2.0 / 2 / 0.0"]
    assert cells(printed, "answers a question") == ["–", "3.0 / 3 / 0.0"]
    assert cells(printed, "different labels") == ["0", "2"]
    page = (tmp_path / "run" / "inspect" / "inspect.html").read_text(encoding="utf8")
    for told in (
        "human: &lt;image&gt;",
        "What &lt;b&gt;?",
        "gpt: A cat.",
        "answers: two | two | 2",
    ):
        assert told in page
    assert "labels: cat, dog" in page and re.search(r"<tr><th>cat</th><td>0</td><td>1</td>", page)


def test_figures_of_counts():
    rng = np.random.default_rng(0)
    for number in (1, 2, 7, 100):
        values = rng.integers(0, 9, number)
        counts = dict(
            zip(*(v.tolist() for v in np.unique(values, return_counts=True)), strict=True)
        )
        mean, median, std = figures(counts)
        assert mean == pytest.approx(values.mean())
        assert median == np.median(values)
        assert std == pytest.approx(values.std(), abs=1e-12)


def test_mistakes(cfg, tmp_path):
    assert "absent.yaml" in run(tmp_path / "absent.yaml", code=2)
    printed = run(cfg, "data.train_name=[main]", code=2)
    assert (
        "command line: data.train_name: no dataset is called 'main'; did you mean 'mine'?"
        in printed
    )
    printed = run(cfg, "data.valid_name=[]", "--split=valid", code=2)
    assert "nothing to inspect: data.valid_name is empty" in printed
    assert "data.trian_name" in run(cfg, "data.trian_name=[mine]", code=2)
    assert "command line: " in run(cfg, "--limit=none", code=2)
    (tmp_path / "file").touch()
    assert "cannot write into" in run(cfg, "--output", tmp_path / "file", code=2)
