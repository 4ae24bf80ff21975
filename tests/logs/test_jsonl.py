"""metrics.jsonl: readable by anything, whole after any death, each step once after a resume."""

import json
import math
import os

import pytest

from engine.logs import jsonl


def test_rows_are_in_the_file_at_once(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    log = jsonl.JsonLines(path)
    log.row({"step": 1, "loss": 0.5})
    assert path.read_text() == '{"step": 1, "loss": 0.5}\n'  # before any close
    log.row({"step": 2, "name": "größe"})
    log.close()
    assert list(jsonl.read(path)) == [{"step": 1, "loss": 0.5}, {"step": 2, "name": "größe"}]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_null(value):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    line = jsonl.dumps({"step": 1, "loss": value})
    assert json.loads(line, parse_constant=refuse) == {"step": 1, "loss": None}


def write(path, rows, tail=""):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)


def test_a_lost_future_is_dropped_on_resume(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": step, "loss": 1 / step} for step in range(1, 8)]
    write(path, [{"note": "no step"}, *rows, {"step": 4, "coco/RSUM": 3.0}])
    log = jsonl.JsonLines(path, resume_step=4)
    for step in (5, 6):
        log.row({"step": step, "loss": 9.0})
    log.close()
    found = list(jsonl.read(path))
    assert [row.get("step") for row in found] == [None, 1, 2, 3, 4, 4, 5, 6]
    assert [row["loss"] for row in found if row.get("step") in (4, 5, 6) and "loss" in row] == [
        0.25, 9.0, 9.0
    ]  # fmt: skip


def test_a_new_start_in_an_old_folder_begins_anew(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, [{"step": 1, "loss": 1.0}])
    jsonl.JsonLines(path, resume_step=0).close()
    assert list(jsonl.read(path)) == []


def test_a_line_cut_short_does_not_spoil_the_next(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, [{"step": 1}, {"step": 2}], tail='{"step": 3, "lo')
    log = jsonl.JsonLines(path)
    log.row({"step": 3})
    log.close()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3}\n'


def test_lines_that_are_no_rows_are_passed_over(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'[1]\n{"step": 1}\n\xff\xfe\n\n3\n')
    assert list(jsonl.read(path)) == [{"step": 1}]


def test_dropping_is_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": step} for step in range(9)]
    write(path, rows)

    def die(descriptor):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", die)
    with pytest.raises(OSError, match="disk full"):
        jsonl.JsonLines(path, resume_step=4)
    assert list(jsonl.read(path)) == rows
