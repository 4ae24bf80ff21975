"""What DeepSpeed is given, and every disagreement between a user's JSON and the YAML."""

from __future__ import annotations

import importlib.machinery
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from engine.config import schema
from engine.dist import deepspeed as zero
from engine.dist.deepspeed import width
from engine.dist.zero_settings import Settings
from engine.errors import UserError

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def config(param: dict[str, Any] | None = None, **optim: Any) -> schema.Config:
    lr = schema.Lr(init=1e-3, name="linear_schedule_with_warmup", warmup_steps=20)
    return schema.Config(
        dist=schema.Dist(name="deepspeed", param=param or {}),
        data=schema.Data(batch_size=64),
        optim=schema.Optim(
            lr=lr, **{"grad_clip": 1.0, "param": {"betas": (0.9, 0.98)}, **optim}
        ),
    )  # fmt: skip


def written(folder: Path, values: Any) -> dict[str, Any]:
    path = folder / "ds.json"
    path.write_text(values if isinstance(values, str) else json.dumps(values))
    return {"config": str(path)}


# As in LLaVA's and transformers' examples
AUTO = {
    "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto", "gradient_clipping": "auto", "steps_per_print": 100,
    "wall_clock_breakdown": False,
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto"}},
    "scheduler": {"type": "WarmupDecayLR", "params": {
        "warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto",
        "total_num_steps": "auto"}},
    "fp16": {"enabled": "auto", "initial_scale_power": 12},
    "bf16": {"enabled": "auto"},
    "zero_optimization": {
        "stage": 3, "overlap_comm": True, "sub_group_size": 1e9, "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto", "stage3_param_persistence_threshold": "auto",
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
    },
}  # fmt: skip


def test_auto_is_filled_in(tmp_path: Path) -> None:
    settings = Settings(config(written(tmp_path, AUTO)), 4, "bf16")
    assert (settings.stage, settings.weights, settings.offloads) == (
        3,
        "bf16",
        ["offload_optimizer"],
    )
    given = settings.resolved(1000, 32)
    found = given["zero_optimization"]
    assert (given["train_batch_size"], given["train_micro_batch_size_per_gpu"]) == (64, 16)
    assert (given["gradient_accumulation_steps"], given["gradient_clipping"]) == (1, 1.0)
    assert given["bf16"] == {"enabled": True}
    assert given["fp16"] == {"enabled": False, "initial_scale_power": 12}
    assert (found["stage"], found["overlap_comm"], found["reduce_bucket_size"]) == (3, True, 1024)
    assert found["stage3_prefetch_bucket_size"] == 921
    assert found["stage3_param_persistence_threshold"] == 320
    assert given["steps_per_print"] == 100
    assert not {"optimizer", "scheduler"} & given.keys()
    assert '"auto"' not in json.dumps(given)


@pytest.mark.parametrize(
    ("param", "precision", "weights"),
    [
        ({}, "bf16", "fp32"),
        ({"weights": "bf16"}, "bf16", "bf16"),
        ({}, "fp16", "fp16"),
        ({}, "fp32", "fp32"),
    ],
)
def test_without_a_file(param: dict[str, Any], precision: str, weights: str) -> None:
    settings = Settings(config(param, grad_clip=None), 2, precision)
    assert (settings.stage, settings.weights, settings.offloads) == (2, weights, [])
    given = settings.resolved(1000, 32)
    assert [n for n in ("bf16", "fp16") if given[n]["enabled"]] == [weights] * (weights != "fp32")
    assert given["gradient_clipping"] == 0.0
    assert given["zero_optimization"]["reduce_bucket_size"] == 1000


@pytest.mark.parametrize(
    ("stage", "wanted"),
    [(1, ["offload_optimizer"]), (3, ["offload_optimizer", "offload_param"])],
)
def test_offload(stage: int, wanted: list[str]) -> None:
    given = Settings(config({"zero_stage": stage, "offload": "cpu"}), 2, "bf16").resolved(9, 9)
    found = {name: value for name, value in given["zero_optimization"].items() if "offload" in name}
    assert found == {name: {"device": "cpu", "pin_memory": True} for name in wanted}


PAIRS = [  # values in the file, and what the message says of both places
    ({"train_batch_size": 32}, "train_batch_size: 32, and data.batch_size is 64"),
    ({"train_micro_batch_size_per_gpu": 8},
     "train_micro_batch_size_per_gpu: 8, and data.batch_size by 2 processes is 32"),
    ({"gradient_accumulation_steps": 4},
     "gradient_accumulation_steps: 4, and data.batch_size by data.batch_size_train is 1"),
    ({"gradient_clipping": 0.5}, "gradient_clipping: 0.5, and optim.grad_clip is 1.0"),
    ({"zero_optimization": {"stage": 3}},
     "zero_optimization.stage: 3, and dist.param.zero_stage is 2"),
    ({"bf16": {"enabled": True}}, "bf16.enabled: true, and dist.precision is fp32"),
    ({"fp16": {"enabled": True}}, "fp16.enabled: true, and dist.precision is fp32"),
    ({"optimizer": {"type": "SGD"}}, 'optimizer.type: "SGD", and optim.name is AdamW'),
    ({"optimizer": {"params": {"lr": 0.01}}},
     "optimizer.params.lr: 0.01, and optim.lr.init is 0.001"),
    ({"optimizer": {"params": {"betas": [0.9, 0.999]}}},
     "optimizer.params.betas: [0.9, 0.999], and optim.param.betas is [0.9, 0.98]"),
    ({"optimizer": {"params": {"weight_decay": 0.1}}},
     "optimizer.params.weight_decay: 0.1, and optim.param.weight_decay is 0.01"),
    ({"scheduler": {"type": "WarmupLR"}},
     'scheduler.type: "WarmupLR", and optim.lr.name is linear_schedule_with_warmup'),
    ({"scheduler": {"params": {"warmup_num_steps": 10}}},
     "scheduler.params.warmup_num_steps: 10, and warm-up in optim.lr is 20"),
    ({"zero_optimization": {"offload_param": {"device": "none"}}},
     'offload_param.device: "none", and dist.param.offload is cpu'),
]  # fmt: skip


@pytest.mark.parametrize(("values", "told"), PAIRS)
def test_a_disagreement_names_both_values_and_the_remedy(
    tmp_path: Path, values: dict[str, Any], told: str
) -> None:
    param = {"zero_stage": 2, "offload": "cpu", **written(tmp_path, values)}
    with pytest.raises(UserError) as caught:
        Settings(config(param), 2, "fp32")
    assert caught.value.key == "dist.param.config"
    message = f"{param['config']} says "
    assert str(caught.value).startswith(message) and told in str(caught.value)
    assert str(caught.value).endswith('write "auto" there, or make them equal')


def test_what_agrees_is_taken(tmp_path: Path) -> None:
    values = {
        "train_batch_size": 64, "train_micro_batch_size_per_gpu": 32, "gradient_clipping": 1,
        "optimizer": {"type": "adamw", "params": {"lr": 1e-3, "betas": [0.9, 0.98], "eps": 1e-8}},
        "scheduler": {"type": "WarmupDecayLR", "params": {"warmup_num_steps": 20}},
        "zero_optimization": {"stage": 1}, "bf16": {"enabled": True},
    }  # fmt: skip
    settings = Settings(config({"weights": "bf16", **written(tmp_path, values)}), 2, "bf16")
    assert (settings.stage, settings.weights) == (1, "bf16")


def test_sub_batches_are_counted(tmp_path: Path) -> None:
    values = {"gradient_accumulation_steps": 4, "train_micro_batch_size_per_gpu": 8}
    parts = {"data": schema.Data(batch_size=64, batch_size_train=16), "runner": {"name": "dga"}}
    found = config(written(tmp_path, values)).model_copy(
        update={**parts, "runner": schema.Runner(name="dga")}
    )
    assert Settings(found, 2, "fp32").resolved(9, 9)["gradient_accumulation_steps"] == 1


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ("{", "is not JSON"),
        ("[]", "holds no object"),
        (
            {"curriculum_learning": {}},
            "curriculum_learning: {}, which cannot be used here; remove it",
        ),
        ({"train_batch": 4}, "did you mean 'train_batch_size'?"),
        ({"fp16": True}, "fp16: true, which cannot be used here"),
        ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, "only cpu is supported"),
        (
            {"zero_optimization": {"cpu_offload": True}},
            "zero_optimization.cpu_offload: true, which cannot be",
        ),
        (
            {"optimizer": {"params": {"cuda_aware": True}}},
            "optimizer.params.cuda_aware: true, which cannot be",
        ),
        (
            {"scheduler": {"params": {"total_num_steps": 9}}},
            "scheduler.params.total_num_steps: 9, which cannot be",
        ),
    ],
)
def test_a_file_that_cannot_be_used(tmp_path: Path, values: Any, told: str) -> None:
    with pytest.raises(UserError) as caught:
        Settings(config(written(tmp_path, values)), 2, "fp32")
    assert told in str(caught.value) and "ds.json" in str(caught.value)
    assert caught.value.key == "dist.param.config"


@pytest.mark.parametrize(
    ("param", "more", "precision", "key", "told"),
    [
        ({"stage": 2}, {}, "fp32", "dist.param.stage", "did you mean 'zero_stage'?"),
        ({"zero_stage": 4}, {}, "fp32", "dist.param.zero_stage", "0, 1, 2 or 3, not 4"),
        ({"offload": "nvme"}, {}, "fp32", "dist.param.offload", "not 'nvme'"),
        ({"config": "/no/such.json"}, {}, "fp32", "dist.param.config", "cannot be read"),
        ({"weights": "bf16"}, {}, "fp32", "dist.param.weights", "cannot be combined with"),
        ({"weights": "fp32"}, {}, "fp16", "dist.param.weights", "cannot be combined with"),
        ({}, {}, "fp64", "dist.precision", "take bf16 or fp32"),
        ({}, {"name": "LARS"}, "fp32", "optim.name", "take one of Adam, AdamW"),
        ({"zero_stage": 0, "offload": "cpu"}, {}, "fp32", "dist.param.zero_stage", "offloaded; t"),
        ({"zero_stage": 0, "weights": "bf16"}, {}, "bf16", "dist.param.weights", "take zero_stage"),
    ],
)
def test_mistakes_in_the_yaml(
    param: dict[str, Any], more: dict[str, Any], precision: str, key: str, told: str
) -> None:
    with pytest.raises(UserError) as caught:
        Settings(config(param, **more), 2, precision)
    assert caught.value.key == key and told in str(caught.value)


def test_a_compiled_model_does_not_go_with_stage_3() -> None:
    compiled = config({"zero_stage": 3}).model_copy(
        update={"runner": schema.Runner(compile=True)}
    )  # fmt: skip
    with pytest.raises(UserError, match=r"runner\.compile: false, or zero_stage: 2"):
        Settings(compiled, 2, "fp32")


def test_without_deepspeed_it_is_said_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zero, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[deepspeed\]'") as caught:
        zero.check(config(), CPU, "fp32")
    assert caught.value.key == "dist.name"


def test_offload_on_a_cpu_is_refused_before_deepspeed_is_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spec = importlib.machinery.ModuleSpec("deepspeed", None)
    monkeypatch.setattr(zero, "find_spec", lambda name: spec)
    with pytest.raises(UserError, match="this run is on the CPU: leave it out") as caught:
        zero.check(config({"offload": "cpu"}), CPU, "fp32")
    assert caught.value.key == "dist.param.offload"


def test_another_release_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.machinery.ModuleSpec("deepspeed", None)
    monkeypatch.setattr(zero, "find_spec", lambda name: spec)
    monkeypatch.setattr(zero, "version", lambda name: "0.14.2")
    with pytest.raises(UserError, match=r"DeepSpeed 0\.14\.2 is installed.*0\.19\.x: pip"):
        zero.check(config(), CPU, "fp32")


def test_deepspeeds_own_complaints_are_passed_on(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason="needs DeepSpeed: pip install -e '.[deepspeed]'")
    values = {"zero_optimization": {"stage": 2, "reduce_bucket_sise": 5}}
    with pytest.raises(UserError, match=r"zero_optimization\.reduce_bucket_sise: ") as caught:
        zero.check(config(written(tmp_path, values)), CPU, "fp32")
    assert caught.value.key == "dist.param.config"


WHOLE = {"weights": 400, "gradients": 200, "optimizer": 400}  # of 100 parameters, half trained


@pytest.mark.parametrize(
    ("param", "wanted"),
    [
        ({"zero_stage": 0}, (400, 200, 400)),
        ({"zero_stage": 1}, (400, 200, 150)),
        ({"zero_stage": 2}, (400, 50, 150)),
        ({"zero_stage": 3}, (100, 50, 150)),
        ({"zero_stage": 2, "weights": "bf16"}, (200, 25, 150)),
        ({"zero_stage": 2, "offload": "cpu"}, (400, 50, 0)),
        ({"zero_stage": 3, "weights": "bf16", "offload": "cpu"}, (0, 25, 0)),
    ],
)
def test_bytes_of_a_device_among_four(param: dict[str, Any], wanted: tuple[int, ...]) -> None:
    found = zero.device_bytes(config(param), "bf16", 4, WHOLE)
    assert tuple(found[name] for name in WHOLE) == wanted


def test_the_width_is_that_of_the_widest_norm() -> None:
    model = nn.Sequential(nn.Linear(9, 500), nn.LayerNorm(12), nn.BatchNorm1d(7))
    assert width(model) == 12
    assert width(nn.Linear(2, 2)) == 1024
