"""FSDP2 against DDP, on two ranks whose data differ: curves, checkpoints, evaluation on the way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from engine.config import schema
from engine.dist import fsdp2
from engine.errors import UserError
from engine.registry import find
from tests.dist import sharded_runs as runs
from tests.dist.sharded_runs import Case
from tests.distributed import run

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
KEPT, LOW = (("reshard_after_forward", False),), (("weights", "bf16"),)
CASES = [
    *(Case(task, "fsdp2") for task in ("clip", "t5_cross", "causal")),
    *(Case("causal", "fsdp2", param) for param in (KEPT, (("offload", "cpu"),))),
    *(Case(task, "fsdp2", rows=2) for task in ("clip", "causal")),
    Case("t5_cross", "fsdp2", disturbed=True),
    Case("vqa", "fsdp2", again=True),
    Case("vqa", "fsdp2", rows=1),  # five sub-batches, and four
    Case("causal", "fsdp2", precision="bf16"),
    Case("t5_cross", "fsdp2", LOW, precision="bf16"),
]
SAVED = [[Case("clip", "fsdp2"), Case("clip")], [Case("clip"), Case("clip", "fsdp2")],
         [Case("causal", "fsdp2", LOW, precision="bf16")]]  # fmt: skip
BOUNDS = {"fp32": 1e-5, "bf16": 1e-4, "bf16 weights": 2e-2}  # as ZeRO's


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[Case, runs.Curve]:
    cases = list(dict.fromkeys([*(case.by_ddp() for case in CASES), *CASES]))
    folder = tmp_path_factory.mktemp("curves")
    return dict(zip(cases, run(runs.curves, 2, cases, folder)[0], strict=True))


@pytest.mark.parametrize("case", CASES)
def test_curves_are_those_of_ddp(found: dict[Case, runs.Curve], case: Case) -> None:
    bound = BOUNDS[f"{case.precision}{' weights' * (case.param == LOW)}"]
    runs.assert_same_curve(found[case], found[case.by_ddp()], case, bound)


def test_a_stopped_run_goes_on_bit_for_bit_and_is_read_without_it(tmp_path: Path) -> None:
    for curves in run(runs.stopped, 2, SAVED, tmp_path)[0]:
        runs.assert_went_on(*curves)
    for number in (0, 1):
        runs.assert_read_alone(tmp_path / f"run{number}" / f"step_{runs.STOP}", tmp_path)


def looked_at_first(folder: Path) -> list[float]:
    return [runs.Run(Case("causal", dist), folder).look(0) for dist in ("torch", "fsdp2")]


def test_a_model_that_was_not_trained_yet_is_evaluated(tmp_path: Path) -> None:
    plain, shared = run(looked_at_first, 2, tmp_path)[0]
    assert shared == pytest.approx(plain, abs=1e-6)


def test_blocks_are_the_members_of_the_outermost_stacks() -> None:
    block = nn.Sequential(nn.Linear(2, 2), nn.GELU(), nn.Linear(2, 2))
    layers = nn.ModuleList([nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)) for _ in range(2)])
    tower = nn.Sequential(nn.Conv2d(1, 1, 1), nn.ModuleList([block]), layers, nn.ReLU())
    heads = nn.ModuleList([nn.ReLU(), nn.ReLU()])
    assert fsdp2.blocks(nn.ModuleDict({"tower": tower, "heads": heads})) == list(layers)


@pytest.mark.parametrize(
    ("param", "more", "device", "precision", "key", "told"),
    [
        (
            {"reshard": True},
            {},
            CPU,
            "fp32",
            "dist.param.reshard",
            "keys of dist.param: offload, resh",
        ),
        ({"weights": "fp8"}, {}, CPU, "bf16", "dist.param.weights", "'fp32' or 'bf16', not 'fp8'"),
        ({"weights": "bf16"}, {}, CPU, "fp32", "dist.param.weights", "which is fp32"),
        ({"offload": "cpu"}, {}, CPU, "fp32", "dist.param.offload", "this run is on the CPU"),
        ({}, {}, CUDA, "fp16", "dist.precision", "take bf16 or fp32"),
        ({}, {"name": "LARS"}, CUDA, "bf16", "optim.name", "take torch.optim.AdamW"),
        ({}, {"name": "timm.optim.Lamb"}, CUDA, "bf16", "optim.name", "take torch.optim.AdamW"),
        ({}, {"name": "nadamuon"}, CUDA, "bf16", "optim.name", "take torch.optim.AdamW"),
    ],
)
def test_mistakes(
    param: dict[str, Any], more: dict[str, Any], device: torch.device, precision: str, key: str,
    told: str,
) -> None:  # fmt: skip
    config = schema.Config(
        dist=schema.Dist(name="fsdp2", param=param), optim=schema.Optim(**more)
    )  # fmt: skip
    with pytest.raises(UserError) as caught:
        fsdp2.check(config, device, precision)
    assert caught.value.key == key and told in str(caught.value)


def test_bytes_of_a_device_among_four() -> None:
    whole = {"weights": 400, "gradients": 200, "optimizer": 400}
    config = schema.Config(dist=schema.Dist(name="fsdp2"))
    assert list(fsdp2.device_bytes(config, "fp32", 4, whole).values()) == [100, 50, 100]


@pytest.mark.parametrize(
    ("name", "form", "told"),
    [
        ("fsdp2", "bf16", "leave dist.param.w"),
        ("deepspeed", "bf16", "leave dist.param.w"),
        ("deepspeed", "fp16", "take bf16,"),
    ],
)
def test_batch_norm_has_no_weights_in_low_precision(name: str, form: Any, told: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    config = schema.Config(dist=schema.Dist(name=name, param={"weights": form}))
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(UserError, match=rf"^1 is a batch norm.*{told}"):
        find("dist", name).build(model, optimizer, config, CPU, form)
