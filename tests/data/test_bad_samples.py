"""Bad samples: each named once, counted by cause, bounded in share."""

import json

import pytest

from engine.data.bad_samples import BadRecord, BadSamples, summary
from engine.errors import UserError


def record(index=0, cause="truncated", dataset="coco", step=1):
    return BadRecord(step, dataset, index, f"{index}.jpg", cause, "28 bytes missing")


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_writes_a_line_of_plain_json(tmp_path):
    path = tmp_path / "run" / "bad_samples.jsonl"
    bad = BadSamples(path, 1.0)
    assert not path.exists()
    bad.add([record(7)], 10)
    assert lines(path) == [
        {
            "step": 1,
            "dataset": "coco",
            "index": 7,
            "key": "7.jpg",
            "cause": "truncated",
            "detail": "28 bytes missing",
        }
    ]


def test_takes_records_that_were_gathered_as_json(tmp_path):
    bad = BadSamples(tmp_path / "b.jsonl", 1.0)
    bad.add([json.loads(json.dumps(record(3).to_json()))], 10)
    assert bad.counts == {"truncated": 1}
    assert lines(tmp_path / "b.jsonl")[0]["index"] == 3


def test_a_sample_is_named_once_over_epochs_but_counted_each_time(tmp_path):
    path = tmp_path / "b.jsonl"
    bad = BadSamples(path, 1.0)
    for step in range(3):
        bad.add([record(1, step=step), record(2, step=step), record(1, "missing", step=step)], 10)
    assert [(row["index"], row["cause"]) for row in lines(path)] == [
        (1, "truncated"),
        (2, "truncated"),
        (1, "missing"),
    ]
    assert (bad.total, bad.seen) == (9, 30)
    assert bad.counts == {"truncated": 6, "missing": 3}


def test_the_same_row_of_another_dataset_is_another_sample(tmp_path):
    bad = BadSamples(tmp_path / "b.jsonl", 1.0)
    bad.add([record(1, dataset="coco"), record(1, dataset="sbu")], 2)
    assert len(lines(tmp_path / "b.jsonl")) == 2


def test_a_resume_adds_only_what_is_new(tmp_path):
    path = tmp_path / "b.jsonl"
    BadSamples(path, 1.0).add([record(1), record(2)], 10)
    resumed = BadSamples(path, 1.0)
    resumed.add([record(2), record(3)], 10)
    assert [row["index"] for row in lines(path)] == [1, 2, 3]
    assert (resumed.total, resumed.seen) == (2, 10)


@pytest.mark.parametrize("torn", ['{"step": 4, "data', "[]", "\ud800".encode("utf8", "replace")])
def test_a_line_torn_by_a_kill_does_no_harm(tmp_path, torn):
    path = tmp_path / "b.jsonl"
    BadSamples(path, 1.0).add([record(1)], 10)
    with path.open("ab") as file:
        file.write(torn if isinstance(torn, bytes) else torn.encode())
    BadSamples(path, 1.0).add([record(1), record(2)], 10)
    texts = path.read_text().splitlines()
    assert len(texts) == 3
    assert [json.loads(texts[i])["index"] for i in (0, 2)] == [1, 2]


def test_names_that_are_not_text_are_written(tmp_path):
    path = tmp_path / "b.jsonl"
    odd = BadRecord(0, "coco", 1, "a\udce9\n.jpg", "missing", "x" * 10_000)
    BadSamples(path, 1.0).add([odd], 1)
    (row,) = lines(path)
    assert row["index"] == 1
    assert len(row["detail"]) == 300


def test_only_the_writing_rank_touches_the_file(tmp_path):
    bad = BadSamples(tmp_path / "b.jsonl", 0.0, write=False)
    with pytest.raises(UserError):
        bad.add([record()], 1000)
    assert not (tmp_path / "b.jsonl").exists()


def test_the_file_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr("engine.data.bad_samples._MAX_LINES", 3)
    bad = BadSamples(tmp_path / "b.jsonl", 1.0)
    bad.add([record(i) for i in range(10)], 10)
    assert len(lines(tmp_path / "b.jsonl")) == 3
    assert bad.total == 10


def test_too_many_stop_the_run_with_all_that_is_needed(tmp_path):
    path = tmp_path / "b.jsonl"
    bad = BadSamples(path, 0.01)
    found = [record(i, "missing" if i % 4 else "truncated") for i in range(20)]
    with pytest.raises(UserError) as error:
        bad.add(found, 200)
    text = str(error.value)
    assert error.value.key == "data.max_bad_fraction"
    assert "20 of 200" in text
    assert "15 missing, 5 truncated" in text
    assert all(f"coco {i}.jpg (row {i})" in text for i in range(5))
    assert "5.jpg" not in text.replace("15.jpg", "")
    assert str(path) in text
    assert "raise data.max_bad_fraction" in text
    assert len(lines(path)) == 20  # written before the run stops


def test_a_few_at_the_beginning_do_not_stop_it(tmp_path):
    bad = BadSamples(tmp_path / "b.jsonl", 0.01)
    bad.add([record(i) for i in range(40)], 99)
    with pytest.raises(UserError):
        bad.add([], 1)


def test_an_epochs_end_is_judged_whatever_its_size(tmp_path):
    bad = BadSamples(tmp_path / "b.jsonl", 0.01)
    bad.add([record()], 12)
    with pytest.raises(UserError, match="1 of 12"):
        bad.add([], 0, epoch_end=True)


def test_chance_does_not_stop_a_run_below_its_bound(tmp_path):
    bad = BadSamples(tmp_path / "b.jsonl", 0.01)
    bad.add([record(i) for i in range(4)], 100)  # 4 %, but of 100 only
    bad.add([], 300, epoch_end=True)  # 1 %: not more than the bound


@pytest.mark.parametrize(("seen", "stops"), [(99, False), (100, True), (10**6, True)])
def test_a_bound_of_nothing_stops_at_the_first(tmp_path, seen, stops):
    bad = BadSamples(tmp_path / "b.jsonl", 0.0)
    if not stops:
        bad.add([record()], seen)
        return
    with pytest.raises(UserError):
        bad.add([record()], seen)


def test_no_bad_samples_never_stop(tmp_path):
    bad = BadSamples(tmp_path / "b.jsonl", 0.0)
    bad.add([], 0, epoch_end=True)
    bad.add([], 10_000, epoch_end=True)
    assert bad.total == 0


def test_summary():
    assert summary([record(1), record(2)]) == "2 truncated (coco 1.jpg, coco 2.jpg)"
    many = summary([record(i, "missing") for i in range(9)])
    assert many.startswith("9 missing (coco 0.jpg,")
    assert many.endswith(", …)")
