"""Predictions on the disk: both forms, whole, and not without end."""

import json

import pytest

from engine.logs import samples


def rows(*ids):
    return [{"image_id": i, "caption": f"an image, {i} ä", "references": ["x"]} for i in ids]


def write(folder, step=1, ids=("7", "12"), dataset="coco"):
    samples.write_samples(folder, dataset, f"step_{step}", rows(*ids))


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        (("7", "391895", "0"), [7, 391895, 0]),
        (("7", "007"), ["7", "007"]),  # two images
        (("7", "a.jpg"), ["7", "a.jpg"]),
        (("٣", "-1"), ["٣", "-1"]),
        (("9" * 30, "1"), [10**30 - 1, 1]),
    ],
)
def test_both_forms(tmp_path, ids, expected):
    write(tmp_path, ids=ids)
    text = (tmp_path / "coco.step_1.jsonl").read_text(encoding="utf8")
    assert [json.loads(line) for line in text.splitlines()] == rows(*ids)
    results = json.loads((tmp_path / "coco.step_1.results.json").read_text(encoding="utf8"))
    assert results == [
        {"image_id": i, "caption": row["caption"]}
        for i, row in zip(expected, rows(*ids), strict=True)
    ]


def test_answers_go_by_their_questions():
    rows = [{"question_id": str(n), "image_id": "7", "answer": f"a{n}"} for n in (3, 1)]
    assert json.loads(samples.results(rows)) == [
        {"question_id": 3, "answer": "a3"}, {"question_id": 1, "answer": "a1"},
    ]  # fmt: skip


def test_names_that_are_no_plain_file_names_or_text(tmp_path):
    write(tmp_path, dataset="a/b", ids=("pic\udc80.jpg",))
    write(tmp_path, dataset="a%2Fb", ids=("x",))
    (told,) = (tmp_path / "a%2Fb.step_1.jsonl").read_text(encoding="utf8").splitlines()
    assert json.loads(told)["image_id"] == "pic\udc80.jpg"
    assert len(list(tmp_path.iterdir())) == 4


def test_the_last_steps_stay_and_what_was_just_written(tmp_path, monkeypatch):
    monkeypatch.setattr(samples, "KEEP", 3)
    for step in (30, 100, 9, 200):
        write(tmp_path, step)
        write(tmp_path, 5, dataset="other")
    samples.write_samples(tmp_path, "coco", "model", rows("1"))  # weights without a step
    write(tmp_path, 8)
    (tmp_path / "coco.step_x.jsonl").write_text("mine")

    def names(ending):
        return sorted(p.name for p in tmp_path.glob(f"*{ending}"))

    steps = ["coco.model", *(f"coco.step_{n}" for n in (100, 200, 30, 8)), "other.step_5"]
    assert names(".results.json") == [f"{name}.results.json" for name in steps]
    assert names(".jsonl") == [*(f"{name}.jsonl" for name in steps[:-1]), "coco.step_x.jsonl",
                               "other.step_5.jsonl"]  # fmt: skip


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    write(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.replace", full)
    with pytest.raises(OSError, match="No space"):
        write(tmp_path, ids=("8",))
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
