"""Tables of images and texts: their forms, figures by hand, and what is written."""

import csv
import json
import math

import pytest
from PIL import Image

from engine.errors import UserError
from engine.evals import score_tables

PAIRS = "image,text,human_score\na,x,1\nb,y,2\nc,z,3\nd,w,\n"
CREPE = "image,kind,caption,negative_caption\na,add,x,y\nb,add,x,y\nc,swap,x,y\n"
WINO = "image_0,image_1,caption_0,caption_1\na,b,x,y\nc,d,x,y\n"


def read(tmp_path, text, **options):
    path = tmp_path / "t.csv"
    path.write_text(text, encoding="utf8")
    return score_tables.read(path, **options)


def test_pairs_beside_people(tmp_path):
    table = read(tmp_path, PAIRS)
    assert table.pairs() == [("a", "x"), ("b", "y"), ("c", "z"), ("d", "w")]
    told = table.figures([0.1, 0.2, 0.4, 0.9])
    assert (told["form"], told["rows"], told["left_out"], told["human_scores"]) == (
        "pairs",
        4,
        0,
        3,
    )
    assert told["mean_score"] == pytest.approx(0.4)
    assert (told["kendall_tau_b"], told["pairwise_accuracy"], told["tie_epsilon"]) == (1, 1, 0)
    assert told["pearson"] == pytest.approx(0.981981)
    assert table.figures([0.3, 0.3, 0.3, 0.3])["pearson"] is None
    assert table.scored([0.1, math.nan, 0.4, 0.9])[1]["vqa_score"] is None
    left = table.figures([math.nan, 0.2, 0.4, 0.9])
    assert (left["left_out"], left["human_scores"]) == (1, 2)


def test_pairs_are_compared_within_groups(tmp_path):
    text = "image,text,human_score\na,x,1\nb,x,2\na,y,9\nb,y,8\n"
    scores = [0.5, 0.6, 0.1, 0.05]
    assert read(tmp_path, text).figures(scores)["pairwise_accuracy"] < 1
    told = read(tmp_path, text, group_by="text").figures(scores, "text")
    assert (told["pairwise_accuracy"], told["pairs_compared"]) == (1, 2)
    with pytest.raises(UserError, match="no pair of items"):
        read(tmp_path, PAIRS, group_by="image").figures([0.1] * 4, "image")


def test_right_and_wrong_texts(tmp_path):
    table = read(tmp_path, CREPE)
    assert len(table.pairs()) == 6
    scores = [0.9, 0.1, 0.3, 0.4, 0.2, 0.1]
    told = table.figures(scores)
    assert told["overall"] == pytest.approx(66.6667)
    assert (told["mean"], told["add"], told["swap"]) == (75, 50, 100)
    assert table.series(scores) == {"right": [0.9, 0.3, 0.2], "wrong": [0.1, 0.4, 0.1]}


def test_two_images_and_two_texts(tmp_path):
    table = read(tmp_path, WINO)
    assert table.pairs()[:4] == [("a", "x"), ("a", "y"), ("b", "x"), ("b", "y")]
    scores = [0.9, 0.1, 0.2, 0.8, 0.9, 0.1, 0.95, 0.96]
    told = table.figures(scores)
    assert (told["text"], told["image"], told["group"]) == (100, 50, 50)
    assert table.series(scores)["right"] == [0.9, 0.8, 0.9, 0.96]


def test_what_is_written(tmp_path):
    table = read(tmp_path, PAIRS)
    scores = [0.1, 0.2, math.nan, 0.9]
    score_tables.write(tmp_path / "out", table, scores, table.figures(scores), "score")
    lines = (tmp_path / "out" / "scores.jsonl").read_text(encoding="utf8").splitlines()
    assert json.loads(lines[0]) == {"image": "a", "text": "x", "human_score": "1", "vqa_score": 0.1}
    with (tmp_path / "out" / "scores.csv").open(encoding="utf8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["vqa_score"] for row in rows] == ["0.1", "0.2", "", "0.9"]
    assert json.loads((tmp_path / "out" / "figures.json").read_text())["left_out"] == 1
    image = Image.open(tmp_path / "out" / "histogram.png")
    assert image.size == (920, 480)
    assert len(image.getcolors(1 << 20)) > 20  # something is drawn


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty; its first line must name its columns"),
        ("image,caption\n", "has the columns image, caption; wanted are image,text, or image,capt"),
        ("image,text\n", "has no rows"),
        ("image,text\na\n", "line 2: fewer values"),
        ("image,text\na,b,c\n", "line 2: more values"),
        ("image,text,human_score\na,b,1\na,b,x\n", "line 3: human_score is 'x', not a number"),
        ("image,text,human_score\na,b,nan\n", "human_score is 'nan'"),
        ('image,text\na,"b\n', "unexpected end of data"),
    ],
)
def test_tables_that_are_wrong(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        read(tmp_path, text)


def test_a_group_or_file_that_is_not_there(tmp_path):
    with pytest.raises(
        UserError, match="no column kind; its columns are: image, text, human_score"
    ):
        read(tmp_path, PAIRS, group_by="kind")
    with pytest.raises(UserError, match="does not exist"):
        score_tables.read(tmp_path / "no.csv")
