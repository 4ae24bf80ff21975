"""Checkpoints are written while training goes on: exact however slow, and no failure vanishes."""

import errno
import os
import time

import pytest

from engine.train import loop
from engine.train.checkpoint import Snapshot


@pytest.fixture
def writes(monkeypatch):
    """Steps whose writing has begun and ended, in order; it takes longer than a step."""
    events, write = [], Snapshot.write

    def slowly(snapshot, folder):
        events.append(("begins", snapshot.step))
        time.sleep(0.3)
        write(snapshot, folder)
        events.append(("ends", snapshot.step))

    monkeypatch.setattr(Snapshot, "write", slowly)
    return events


def refuse(monkeypatch, *steps):
    write = Snapshot.write

    def refused(snapshot, folder):
        if snapshot.step in steps:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(snapshot, folder)

    monkeypatch.setattr(Snapshot, "write", refused)


def test_slow_saves_hold_the_state_of_their_step(launch, writes, monkeypatch):
    update = loop.Training._update

    def noted(training, step, *rest):
        writes.append(("step", step + 1))
        update(training, step, *rest)

    monkeypatch.setattr(loop.Training, "_update", noted)
    launch("ckpt.step_interval=1", "ckpt.keep_last=9")
    assert [name for name, _ in writes if name != "step"] == ["begins", "ends"] * 8  # one at a time
    assert writes.index(("step", 2)) < writes.index(("ends", 1))  # trained in the meantime
    assert writes[-1] == ("ends", 8)  # the run ends after its last save
    monkeypatch.undo()
    resumed = launch.output / "tiny" / "checkpoints" / "step_3"
    launch("--exp_name=resumed", f"ckpt.resume={resumed}")
    assert launch.weights(8, "resumed") == launch.weights(8)
    assert launch.losses("resumed") == launch.losses()[3:]


def test_a_failed_save_stops_the_run_at_the_next_one(launch, monkeypatch):
    refuse(monkeypatch, 3)
    printed = launch(code=1).stderr
    assert "step_3 could not be saved: No space left on device" in printed
    assert "Traceback" not in printed
    assert len(launch.losses()) == 4  # up to the evaluation, which waits for it
    monkeypatch.undo()
    launch()
    launch("--exp_name=whole")
    assert launch.weights(8) == launch.weights(8, "whole")


def test_a_failed_last_save_is_told_at_the_end(launch, monkeypatch):
    refuse(monkeypatch, 8)
    printed = launch(code=1).stderr
    assert "step_8 could not be saved" in printed and "still there: step_4, step_6" in printed


def test_what_ends_a_run_does_not_hide_a_failed_save(launch, monkeypatch):
    refuse(monkeypatch, 3)
    update = loop.Training._update

    def fails(training, step, *rest):
        if step == 3:
            raise loop.FaultError("the device is gone")
        update(training, step, *rest)

    monkeypatch.setattr(loop.Training, "_update", fails)
    printed = launch(code=1).stderr
    assert printed.index("the device is gone") < printed.index("step_3 could not be saved")
