"""Sharded models evaluated in training: answers, chosen and generated, and VQAScore as by DDP."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ.setdefault("DS_ACCELERATOR", "cpu")
from engine.config.schema import Generate
from engine.data.transforms import pipeline
from engine.dist import collectives
from engine.evals.predict import Predictor
from engine.evals.vqa_score import VQAScore
from tests.dist import sharded_runs as runs
from tests.dist.sharded_runs import Case
from tests.distributed import run
from tests.evals.test_vqa import COLOURS, Asked, evaluate

ROWS = 9  # of two at a time: three batches at one rank, two at the other
SECTIONS = Generate(max_new_tokens=5, batch_size=4), Generate(answers=COLOURS, batch_size=4)
DDP = Case("vqa")
CUT = ("config", "cut.json")
CASES = [
    *(Case("vqa", "deepspeed", (("zero_stage", stage), CUT)) for stage in (1, 2, 3)),
    Case("vqa", "fsdp2"),
]
installed = importlib.util.find_spec("deepspeed") is not None


def seen(case: Case, folder: Path) -> dict[str, Any]:
    """What the model says before training, after two steps, and by how many passes it does."""
    ran, passes = runs.Run(case, folder), []
    ran.state.module.connector.register_forward_hook(lambda *_: passes.append(1))
    transforms = ran.task.config.transforms.model_copy(update={"valid_transforms": ["resize"]})
    ran.task.config = ran.task.config.model_copy(update={"transforms": transforms})
    transform = pipeline.build(["resize"], transforms, "transforms")
    encoder = Predictor(ran.task, ran.state.module, transform, torch.device("cpu"), num_workers=0)
    pixels = torch.rand(3, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    said, scores, counts = [], [], []
    for steps in (range(0), range(2)):
        ran.go(steps)
        with ran.state.parallel.whole():
            for section in SECTIONS:
                passes.clear()
                said.append(evaluate(encoder, Asked(ROWS), section).predictions)
                counts.append(len(passes))
            score = VQAScore(ran.state.module, ran.task, question="{}?")
            mine = slice(None, 1 + 2 * collectives.rank())  # one image, and three
            scores.append(score(pixels[mine], ["a", "bc"]))
    after = ran.go(range(2, 4)).losses
    return {"said": said, "scores": scores, "counts": counts, "losses": after}


def all_seen(cases: list[Case], folder: Path) -> list[dict[str, Any]]:
    return [seen(case, folder) for case in cases]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[Case, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("evaluation")
    (folder / "cut.json").write_text(
        json.dumps({"zero_optimization": {"stage3_param_persistence_threshold": 0}})
    )
    cases = [DDP, *(case for case in CASES if installed or case.dist != "deepspeed")]
    ranks = run(all_seen, 2, cases, folder)
    return dict(zip(cases, (list(pair) for pair in zip(*ranks, strict=True)), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_the_figures_are_those_without_sharing(
    found: dict[Case, list[dict[str, Any]]], case: Case
) -> None:
    if case not in found:
        pytest.skip("needs DeepSpeed: pip install -e '.[deepspeed]'")
    assert [rank["counts"] for rank in found[case]] == [[3, 3] * 2, [2, 2] * 2]
    for mine, plain in zip(found[case], found[DDP], strict=True):
        for one, two in zip(mine["said"], plain["said"], strict=True):
            assert [p.answer for p in one] == [p.answer for p in two]
            assert len(one) == ROWS and any(p.answer for p in one)
            chances = [p.probability for p in two if p.probability is not None]
            assert [p.probability for p in one if p.probability is not None] == pytest.approx(
                chances, rel=1e-5
            )
            assert not chances or max(chances) - min(chances) > 1e-4
        for one, two in zip(mine["scores"], plain["scores"], strict=True):
            torch.testing.assert_close(one, two, rtol=1e-5, atol=0)
        assert mine["losses"] == pytest.approx(plain["losses"], rel=1e-5)
        assert not torch.equal(mine["scores"][0], mine["scores"][1])  # two steps apart
