"""Fan-out of rows, and that no log can stop a run."""

import io
import subprocess
import sys

import numpy as np
import pytest
import torch
from rich.console import Console

from engine.config import schema
from engine.logs import jsonl, run_log
from engine.logs.progress import Progress


class Recorder:
    """A sink that takes rows alone."""

    def __init__(self, fail_at=None):
        self.rows, self.closed, self.fail_at = [], False, fail_at

    def row(self, row):
        if row["step"] == self.fail_at:
            raise ConnectionError("gone")
        self.rows.append(row)

    def examples(self, *given):
        pass

    def close(self):
        self.closed = True


def quiet():
    out = io.StringIO()
    return Progress(console=Console(file=out, width=200)), out


def rows_of(folder):
    rows = list(jsonl.read(folder / "metrics.jsonl"))
    assert all(row.pop("seconds") >= 0 for row in rows)
    return rows


def test_every_sink_gets_every_row_as_plain_numbers(tmp_path):
    sinks = Recorder(), Recorder()
    with run_log.RunLog(tmp_path, sinks, progress=quiet()[0]) as log:
        log.row({"step": 1, "loss": torch.tensor([0.5]), "lr": np.float32(0.25), "name": "a"})
    expected = [{"step": 1, "loss": 0.5, "lr": 0.25, "name": "a"}]
    assert sinks[0].rows == sinks[1].rows == rows_of(tmp_path) == expected
    assert all(sink.closed for sink in sinks)


def test_a_failing_sink_is_named_once_and_left_out(tmp_path):
    progress, out = quiet()
    bad, good = Recorder(fail_at=2), Recorder()
    with run_log.RunLog(tmp_path, [bad, good], progress=progress) as log:
        for step in range(1, 5):
            log.row({"step": step})
    assert [row["step"] for row in bad.rows] == [1]
    assert not bad.closed
    assert [row["step"] for row in good.rows] == [1, 2, 3, 4]
    assert len(rows_of(tmp_path)) == 4
    assert out.getvalue().count("the Recorder log stops here: ConnectionError: gone") == 1


def test_a_reader_of_the_output_that_is_gone_stops_nothing(tmp_path):
    code = f"""
import pathlib, sys, time
from engine.logs.run_log import RunLog
with RunLog(pathlib.Path({str(tmp_path)!r})) as log:
    for step in range(1, 30):
        log.row({{"step": step, "lr": 0.1}})
        log.message("hello")
        time.sleep(0.01)
sys.exit(7)
"""
    done = subprocess.run(
        ["bash", "-c", 'set -o pipefail; "$1" -c "$2" | head -1', "-", sys.executable, code],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (7, "")
    assert done.stdout == "step 1  lr 1.00e-01\n"
    assert len(rows_of(tmp_path)) == 29


def test_examples_go_to_those_who_show_them(tmp_path):
    class Viewer(Recorder):
        shown = ()

        def examples(self, *given):
            if self.fail_at == given[0]:
                raise ValueError("no picture")
            self.shown = (*self.shown, given)

    plain, good, bad = Recorder(), Viewer(), Viewer(fail_at=2)
    progress, out = quiet()
    with run_log.RunLog(tmp_path, [plain, good, bad], progress=progress) as log:
        for step in (1, 2, 3):
            log.examples(step, "coco", ["an example"])
        log.examples(4, "coco", [])  # nothing to see
        log.row({"step": 4})
    assert good.shown == tuple((step, "coco", ["an example"]) for step in (1, 2, 3))
    assert bad.shown == good.shown[:1] and bad.rows == []
    assert plain.rows == good.rows == [{"step": 4}]
    assert out.getvalue().count("the Viewer log stops here: ValueError: no picture") == 1


def test_resume_reaches_the_file(tmp_path):
    for resume_step, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        with run_log.RunLog(tmp_path, progress=quiet()[0], resume_step=resume_step) as log:
            for step in steps:
                log.row({"step": step})
    assert [row["step"] for row in rows_of(tmp_path)] == [1, 2, 3, 4]


def test_only_rank_0_writes(tmp_path):
    config = schema.Config()
    with run_log.open_log(config, tmp_path / "run", rank=1) as log:
        log.row({"step": 1})
        log.examples(1, "coco", ["an example"])
        log.message("not seen")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("tensorboard", [False, True])
def test_the_configuration_chooses_the_sinks(tmp_path, tensorboard, capsys):
    config = schema.Config(log=schema.Log(tensorboard=tensorboard, step_interval=1))
    with run_log.open_log(config, tmp_path, total_steps=2) as log:
        log.row({"step": 1, "loss": 0.5, "lr": 0.1})
    assert "step 1/2 50%  loss 0.5000" in capsys.readouterr().out
    assert len(list(tmp_path.glob("events.*"))) == tensorboard
    assert len(rows_of(tmp_path)) == 1


def test_tensorboard_is_imported_only_where_it_is_wanted():
    code = "import sys, engine.logs.run_log; print('torch.utils.tensorboard' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
