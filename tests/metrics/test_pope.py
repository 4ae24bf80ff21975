"""Figures of yes and no, and POPE's files."""

import json

import pytest

from engine.errors import UserError
from engine.metrics import pope


@pytest.mark.parametrize(
    ("answer", "means_yes", "clear"),
    [
        ("Yes", True, True), ("no", False, True), (" NO\n", False, True), ("No, no", False, True),
        ("It is not there", False, True), ("Yes. There is no cat", True, True),
        ("a cat", True, False), ("", True, False), ("nothing", True, False), ("known", True, False),
        ("yes no", False, True),
    ],
)  # fmt: skip
def test_reading(answer, means_yes, clear):
    assert (pope.means_yes(answer), pope.is_clear(answer)) == (means_yes, clear)


def test_figures_by_hand():
    said = ["yes", "yes", "no", "cat", None, "no", None]
    labels = [True, False, True, True, True, False, False]
    assert pope.figures(said, labels) == pytest.approx(
        {
            "accuracy": 300 / 7, "precision": 200 / 3, "recall": 50, "f1": 400 / 7,
            "yes_share": 300 / 7, "unclear": 1, "questions": 7,
        }
    )  # fmt: skip
    alone = pope.figures(["no"], [False])
    assert (alone["accuracy"], alone["precision"], alone["recall"], alone["f1"]) == (100, 0, 0, 0)


def lines(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf8")
    return path


LABELS = [
    {"question_id": 1, "setting": "random", "label": "yes"},
    {"question_id": 2, "setting": "random", "label": "no"},
    {"question_id": 1, "setting": "popular", "label": "yes"},
    {"question_id": 2, "setting": "popular", "label": "no"},
]
IN_ORDER = [{"question_id": str(n), "answer": a} for n, a in ((1, "yes"), (2, "yes"))] * 2
NAMED = [
    {"question_id": 2, "setting": "popular", "answer": "no"},
    {"question_id": 1, "setting": "random", "answer": "yes"},
]


def test_answers_find_their_question(tmp_path):
    labels = lines(tmp_path / "l.jsonl", LABELS)
    by_place = pope.read(labels, lines(tmp_path / "r.jsonl", IN_ORDER))
    assert by_place[1] == ["yes", "yes"] * 2
    by_name = pope.read(labels, lines(tmp_path / "n.jsonl", NAMED))
    assert by_name == (
        [True, False] * 2,
        ["yes", None, None, "no"],
        ["random"] * 2 + ["popular"] * 2,
    )
    once = lines(tmp_path / "once.jsonl", LABELS[:2])
    assert pope.read(once, lines(tmp_path / "o.jsonl", IN_ORDER[1:2]))[1] == [None, "yes"]


def test_the_command_on_real_labels(shared_data, tmp_path, capsys):
    labels = shared_data / "coco" / "pope.csv"
    said = lines(tmp_path / "r.jsonl", [
        {"question_id": row["question_id"], "answer": "yes"} for row in pope._rows(labels, "")
    ])  # fmt: skip
    assert pope.main(["--labels", str(labels), "--results", str(said)]) == 0
    told = json.loads(capsys.readouterr().out)
    assert set(told) == {"unanswered", "overall", "random", "popular", "adversarial"}
    assert told["overall"]["questions"] == 54
    for setting in ("random", "popular", "adversarial"):  # half of each are there
        assert told[setting] == {
            "accuracy": 50, "precision": 50, "recall": 100, "f1": 66.67, "yes_share": 100,
            "unclear": 0, "questions": 18,
        }  # fmt: skip


@pytest.mark.parametrize(
    ("labels", "results", "message"),
    [
        (LABELS, IN_ORDER[:1], "ids in several settings"),
        (LABELS[:2], [IN_ORDER[0], IN_ORDER[0]], "question 1 more than once"),
        (LABELS, [NAMED[0], NAMED[0]], "question popular 2 more than once"),
        (LABELS, [{**NAMED[0], "setting": "other"}], "answers none of"),
        (LABELS[:2], [{"question_id": 9, "answer": "no"}], "answers none of"),
        ([{**LABELS[0], "label": "maybe"}], IN_ORDER, "label is 'maybe'"),
        ([{"label": "yes"}], IN_ORDER, "no question_id"),
        (LABELS, [{"question_id": 1}], "no answer"),
        ([], IN_ORDER, "holds no"),
    ],
)
def test_files_that_are_wrong(tmp_path, labels, results, message):
    given = [lines(tmp_path / f"{n}.jsonl", rows) for n, rows in enumerate((labels, results))]
    with pytest.raises(UserError, match=message):
        pope.read(*given)
