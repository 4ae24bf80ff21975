"""What is printed: plain lines in a file, one live line in a terminal, tables of figures."""

import io
from types import SimpleNamespace

import pytest

from engine.logs import progress
from engine.logs.progress import Output, Progress, duration, evaluation_table

ROW = {"epoch": 0.5, "loss": 1.23456, "lr": 1e-3, "samples_per_second": 812.3, "data_wait": 0.034,
       "batch_R@1": 41.26}  # fmt: skip


@pytest.fixture
def clock(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def printer(terminal=False, **options):
    out = io.StringIO()
    console = Output(file=out, force_terminal=terminal, width=200)
    return Progress(console=console, **options), out


def test_a_line_has_all_that_is_asked_for(clock):
    shown, out = printer(total_steps=100, step_interval=1)
    shown.row({"step": 49, **ROW})
    clock.now = 2.0
    shown.row({"step": 50, **ROW})
    assert out.getvalue().splitlines()[1] == (
        "step 50/100 50%  loss 1.2346  R@1 41.3  lr 1.00e-03  812 samples/s  data wait 3%"
        "  ETA 1m 40s"
    )


def test_lines_fall_on_the_interval_the_first_and_the_last():
    shown, out = printer(total_steps=25, step_interval=10)
    for step in range(3, 26):
        shown.row({"step": step, **ROW})
    steps = [int(line.split("/")[0].split()[1]) for line in out.getvalue().splitlines()]
    assert steps == [3, 10, 20, 25]


def test_eta_follows_the_pace(clock):
    shown, out = printer(total_steps=1000, step_interval=1)
    for step in range(1, 201):
        clock.now += 10.0 if step < 100 else 1.0
        shown.row({"step": step, **ROW})
    assert out.getvalue().splitlines()[-1].endswith("ETA 13m 20s")  # 800 steps of a second


def test_absent_and_unknown_values_are_left_out():
    shown, out = printer()
    shown.row({"step": 7, "lr": 0.1, "loss": None, "extra": 3})
    assert out.getvalue() == "step 7  lr 1.00e-01\n"


def test_one_live_line_in_a_terminal(clock):
    shown, out = printer(terminal=True, total_steps=100, step_interval=10)
    for step in range(1, 101):
        clock.now += 0.01
        shown.row({"step": step, **ROW})
    shown.message("a checkpoint")
    shown.close()
    text = out.getvalue()
    assert 3 <= text.count("samples/s") <= 15  # redrawn some times a second, not each step
    assert "step 100/100" in text
    assert "a checkpoint" in text


def test_message_is_no_markup():
    shown, out = printer()
    shown.message("optim.groups[0]: [red]x[/red]")
    assert out.getvalue() == "optim.groups[0]: [red]x[/red]\n"


def test_evaluations_become_a_table():
    shown, out = printer()
    shown.row({"step": 5, "coco/RSUM": 363.456, "flickr/RSUM": 476.0, "coco/median": 2.0,
                  "coco/shuffled_words/RSUM": 1.0})  # fmt: skip
    lines = [line.split() for line in out.getvalue().splitlines()]
    cells = [[cell for cell in line if cell not in "│┃"] for line in lines]
    assert ["step", "5"] in cells
    assert ["coco", "flickr", "coco/shuffled_words"] in cells
    assert ["RSUM", "363.46", "476.00", "1.000"] in cells
    assert ["median", "2.000", "–", "–"] in cells


def test_a_row_of_neither_kind_prints_nothing():
    shown, out = printer()
    shown.row({"step": 5, "seconds": 3})
    assert out.getvalue() == ""


def test_table_keeps_order():
    table = evaluation_table({"b/x": 1, "a/x": 2, "b/y": 3})
    assert [column.header for column in table.columns] == ["", "b", "a"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (12.4, "12s"), (200, "3m 20s"), (7500, "2h 05m"), (93600, "1d 2h")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text
