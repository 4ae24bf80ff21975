"""Event files, read back by TensorBoard's own reader."""

import pytest

from engine.logs.tensorboard import TensorBoard

accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")


def curves(folder):
    reader = accumulator.EventAccumulator(str(folder))
    reader.Reload()
    return {
        tag: [(event.step, round(event.value, 4)) for event in reader.Scalars(tag)]
        for tag in reader.Tags()["scalars"]
    }


def test_numbers_become_curves(tmp_path):
    log = TensorBoard(tmp_path)
    log.row({"step": 1, "epoch": 0.1, "loss": 0.5, "note": "text", "skipped": None})
    log.row({"step": 2, "epoch": 0.2, "loss": 0.25})
    log.row({"step": 2, "coco/RSUM": 300.0})
    log.close()
    assert curves(tmp_path) == {
        "train/loss": [(1, 0.5), (2, 0.25)],
        "coco/RSUM": [(2, 300.0)],
    }


def test_a_lost_future_is_purged_on_resume(tmp_path):
    first = TensorBoard(tmp_path)
    for step in (1, 2, 3):
        first.row({"step": step, "loss": 1.0})
    first.close()
    again = TensorBoard(tmp_path, resume_step=1)
    again.row({"step": 2, "loss": 2.0})
    again.close()
    assert curves(tmp_path) == {"train/loss": [(1, 1.0), (2, 2.0)]}
