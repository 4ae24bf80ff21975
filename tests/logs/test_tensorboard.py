"""Event files, read back by TensorBoard's own reader."""

import io

import pytest
from PIL import Image

from engine.logs.gallery import Example
from engine.logs.tensorboard import TensorBoard

accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")


def loaded(folder):
    reader = accumulator.EventAccumulator(str(folder))
    reader.Reload()
    return reader


def curves(folder):
    reader = loaded(folder)
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


def test_examples_are_a_picture_and_a_table(tmp_path):
    log = TensorBoard(tmp_path)
    shown = [Example(Image.new("RGB", (40, 20), c), ["own"], [(c, None)]) for c in ("red", "blue")]
    log.examples(7, "coco", shown)
    log.examples(9, "coco", shown[:1])
    log.close()
    reader = loaded(tmp_path)
    pictures = reader.Images("coco/examples")
    assert [(event.step, event.width) for event in pictures] == [(7, 466), (9, 236)]
    with Image.open(io.BytesIO(pictures[0].encoded_image_string)) as picture:
        assert [picture.getpixel((6 + 230 * n + 112, 6 + 112)) for n in (0, 1)] == [
            (255, 0, 0), (0, 0, 255),
        ]  # fmt: skip
    first, last = reader.Tensors("coco/examples/text_summary")
    table = first.tensor_proto.string_val[0].decode()
    assert (first.step, last.step) == (7, 9)
    assert "| 1 | red | own |" in table and "| 2 | blue | own |" in table
