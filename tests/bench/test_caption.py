"""What the caption rows measure by: memory held, memory of a process, padding, sizes, turns."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.bench import accumulate, caption, caption_peer, head, runs, timing
from tests.bench.table import Options

QUICK = Options(quick=True, threads=1, repeats=1)


def test_what_is_held_between_calls_is_counted_and_nothing_else() -> None:
    model, kept, x = nn.Linear(4, 4), [], torch.zeros(2, 4)

    def work() -> None:
        for _ in range(5):  # broken off at the third
            with torch.no_grad():
                model(x)
            kept.append(torch.ones(1000))

    assert accumulate.held(work, model, 3) == 2 * 4000
    assert len(kept) == 2


def test_a_childs_memory_is_its_own(tmp_path: Path) -> None:
    ballast = bytearray(b"x" * 2**28)  # of this process
    command = [sys.executable, "-c", "import time; x = b'x' * 2**26; time.sleep(0.5)"]
    found = runs.run_process(command, tmp_path / "log.txt", 1)
    assert 64 < found.peak_mib < 128
    assert runs.high_water_kib() > len(ballast) / 2**10


def test_the_peers_labels_are_padded_and_nothing_else_is(tmp_path: Path) -> None:
    _, config = caption.configured(QUICK, tmp_path)
    labels = [torch.tensor([5, 6, 7]), torch.tensor([8])]
    images = torch.full((2, 3, 4, 4), 255, dtype=torch.uint8)
    rows = [
        {"image_CHW": image, "labels_T": label} for image, label in zip(images, labels, strict=True)
    ]
    batch = caption_peer.Collate(config)(rows)
    assert batch["labels"].tolist() == [[5, 6, 7], [8, -100, -100]]
    longer = caption_peer.Collate(config, 5)(rows)["labels"]
    assert longer.tolist() == [[5, 6, 7, -100, -100], [8, -100, -100, -100, -100]]
    normal = config.transforms.normalize
    want = (1 - normal.mean[0]) / normal.std[0]
    torch.testing.assert_close(batch["pixel_values"][:, 0], torch.full((2, 4, 4), want))


def test_models_of_unlike_size_are_not_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, config = caption.configured(QUICK, tmp_path)
    case = caption.Case(config, tmp_path)
    assert case.tokens == sum(len(row["labels_T"]) for row in case.rows)
    caption.assert_same_size(case)
    wider: dict[str, Any] = {"hidden_size": 240}
    tower = config.model.image_encoder.model_copy(
        update={"param": config.model.image_encoder.param | wider}
    )
    other = config.model.model_copy(update={"image_encoder": tower})
    monkeypatch.setattr(case, "config", config.model_copy(update={"model": other}))
    with pytest.raises(AssertionError):
        caption.assert_same_size(case)


def test_a_wrong_gradient_of_the_head_is_found() -> None:
    inputs = head.make_inputs(2, 50, 8, torch.float64)
    work = head.candidates(*inputs)
    assert head.largest_difference(work) < 1e-12
    loss, (of_states, of_table) = work["ours"]()
    work["ours"] = lambda: (loss, (of_states, of_table * 1.001))
    assert head.largest_difference(work) > 1e-4


def test_ratios_are_taken_round_by_round() -> None:
    found = timing.ratio([2.0, 20.0, 200.0], [1.0, 10.0, 100.0])
    assert found == {"ratio": 2.0, "spread": 0.0}
    order: list[str] = []
    seconds = timing.in_turns({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 1)
    assert order == ["b", "a", "a", "b", "b", "a"] or order == ["a", "b", "b", "a", "a", "b"]
    assert [len(each) for each in seconds.values()] == [2, 2]
