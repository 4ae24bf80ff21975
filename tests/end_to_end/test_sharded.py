"""Models in shares as a user asks for them, and their checkpoints read without what shared them."""

import importlib.util
import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file

from engine.dist import deepspeed as zero
from tests.end_to_end.conftest import ROOT
from tests.end_to_end.test_caption import SMALL, mistake

installed = importlib.util.find_spec("deepspeed") is not None
needs_deepspeed = pytest.mark.skipif(
    not installed, reason="needs DeepSpeed: pip install -e '.[deepspeed]'"
)
ONE = (
    "dist.precision=fp32", "epoch=2", "generate.method=greedy", "generate.max_new_tokens=4",
    "model.image_encoder.param.norm_layer=groupnorm1",  # batch norm sees its rank alone
    "ckpt.keep_last=9", "eval.captions.num_images=4",
)  # fmt: skip
TWO = ("--nproc_per_node=2", "dist.name=deepspeed")


@pytest.fixture
def caption(launch):
    def started(*flags, code=0):
        cfg = ROOT / "configs/caption/shapes_causal.yaml"
        return launch(*SMALL, *ONE, *flags, cfg=cfg, code=code)

    return started


@pytest.fixture
def without_deepspeed(monkeypatch):
    """As where it is not installed: nothing of it can be imported."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "deepspeed"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    monkeypatch.setattr(zero, "find_spec", lambda name: None)


@needs_deepspeed
def test_a_run_by_zero_3_is_gone_on_with_and_read_without_it(
    caption, launch, tmp_path, without_deepspeed
):
    caption("data.exp_name=plain")
    settings = tmp_path / "ds.json"
    cut = {"stage": 3, "stage3_param_persistence_threshold": 0}
    settings.write_text(json.dumps({"zero_optimization": cut, "train_batch_size": "auto"}))
    config = f"dist.param={{config: {settings}}}"
    done = caption("data.exp_name=shared", *TWO, config, "eval.epoch_interval=1")
    assert "0.8M parameters, fp32 on 2 × cpu" in done.stdout
    shutil.rmtree(launch.output / "shared" / "checkpoints" / "step_8")
    assert "from step 4" in caption("data.exp_name=shared").stdout
    plain, shared = launch.losses("plain"), launch.losses("shared")
    assert len(plain) == len(shared) == 8
    assert max(abs(a - b) for a, b in zip(plain, shared, strict=True)) <= 1e-5
    folder = launch.output / "shared" / "checkpoints" / "step_4"
    saved = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    # the figures of the evaluation in training, which generates, are those of one afterwards
    caption("data.exp_name=shared", "--mode=eval", f"ckpt.resume={folder}", *TWO[1:])
    text = (launch.output / "shared" / "evaluations.jsonl").read_text()
    again = json.loads(text.splitlines()[-1])
    before = next(row for row in launch.rows("shared") if "tiny/CIDEr" in row)
    assert before["step"] == 4
    assert {key: again[key] for key in before if "/" in key} == {
        key: value for key, value in before.items() if "/" in key
    }
    caption("data.exp_name=next", f"model.init={folder}", "epoch=1")
    assert launch.losses("next")[0] < plain[0]


def test_zero_without_deepspeed_is_said_before_data_is_read(caption, without_deepspeed):
    wrong = ("dist.name=deepspeed", "dist.param={zero_stage: 3}", "data.train_name=[nothing]")
    for mode in ("train", "check"):
        done = caption(*wrong, f"--mode={mode}", code=2)
        mistake(done, "dist.name", "not installed", "pip install -e '.[deepspeed]'")


def test_fsdp2_computes_what_one_process_does(caption, launch):
    flags = ("epoch=1", "eval.epoch_interval=null")
    caption("data.exp_name=plain", *flags)
    caption("data.exp_name=shared", "--nproc_per_node=2", "dist.name=fsdp2", *flags)
    pairs = zip(launch.losses("plain"), launch.losses("shared"), strict=True)
    assert max(abs(one - two) for one, two in pairs) <= 1e-5
