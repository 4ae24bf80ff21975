"""How far generation is, and what becomes of what is done when it ends early."""

import types

import pytest

from engine.data.bad_samples import BadRecord
from engine.errors import UserError
from engine.modes import generate
from engine.modes.generate import Output, heading


def run(folder, *, stop="", batch_size=4):
    warned = []
    config = types.SimpleNamespace(
        generate=types.SimpleNamespace(output=None, batch_size=batch_size)
    )
    return types.SimpleNamespace(
        config=config, run_dir=folder, warn=warned.append, warned=warned,
        stop=types.SimpleNamespace(requested=bool(stop), name=stop),
    )  # fmt: skip


def test_it_tells_now_and_then_how_far_it_is(tmp_path, capsys, monkeypatch):
    now = iter([100.0, 102.0, 110.0, 111.0, 130.0])
    monkeypatch.setattr(generate, "time", types.SimpleNamespace(monotonic=lambda: next(now)))
    output = Output(run(tmp_path), "captions", 17, "image")
    output.prepare()  # at 100
    assert [output.after_batch() for _ in range(4)] == [False] * 4
    assert capsys.readouterr().out.splitlines() == [
        "captions: 8 of 17 images  0.8/s  ETA 11s",
        "captions: 16 of 17 images  0.5/s  ETA 2s",
    ]


def test_what_is_done_when_it_is_stopped_lies_apart(tmp_path):
    made = run(tmp_path, stop="SIGINT")
    output = Output(made, "labels", 3, "image")
    output.prepare()
    assert output.after_batch()
    assert output.settle([1], [], "nothing") == tmp_path / "labels" / "partial"
    assert output.settle([], [], "nothing") is None
    assert made.warned == [
        f"SIGINT: {done} of 3 images done; the rest is left out" for done in (1, 0)
    ]


def test_what_is_left_out_is_named_and_nothing_at_all_is_an_error(tmp_path):
    made, bad = run(tmp_path), [BadRecord(0, "in", 1, "b.png", "corrupt", "")]
    output = Output(made, "labels", 2, "image")
    output.prepare()
    assert output.settle([1], bad, "nothing") == tmp_path / "labels"
    assert made.warned == ["1 image left out: 1 corrupt (in b.png)"]
    assert (tmp_path / "labels" / "bad_samples.jsonl").exists()
    output.settle([1, 2], [], "nothing")
    assert not (tmp_path / "labels" / "bad_samples.jsonl").exists()
    with pytest.raises(UserError, match="none can be read: 1 corrupt") as caught:
        output.settle([], bad, "none can be read")
    assert caught.value.key == "generate.input"


def test_headings():
    assert heading([1], [1], "image") == "1 image"
    assert heading([1], range(1200), "question") == "The first 1 of 1,200 questions"
