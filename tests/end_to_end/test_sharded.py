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
from tests.end_to_end.test_vqa import ASKED, T5, talks, vqa  # noqa: F401  two of them fixtures

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
CUT = {"stage": 3, "stage3_param_persistence_threshold": 0}  # else all that is small stays whole


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
    caption, launch, tmp_path, without_deepspeed, meteor
):
    caption("data.exp_name=plain")
    settings = tmp_path / "ds.json"
    settings.write_text(json.dumps({"zero_optimization": CUT, "train_batch_size": "auto"}))
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
    if importlib.util.find_spec("onnx"):
        caption("data.exp_name=shared", "--mode=export", f"ckpt.resume={folder}", *TWO[1:])
        exported = launch.output / "shared" / "export" / "onnx"
        assert {"decoder.onnx", "image_encoder.onnx"} <= {f.name for f in exported.iterdir()}


@needs_deepspeed
def test_answers_by_zero_3_are_those_of_one_process(vqa, launch, talks, tmp_path):  # noqa: F811
    """Conversations of which half have no image; nine questions, five for one rank; then ZeRO-2."""
    settings = tmp_path / "ds.json"
    settings.write_text(json.dumps({"zero_optimization": CUT}))
    data, *talks = talks
    datasets = json.loads(data.partition("=")[2]) | ASKED
    flags = (
        *talks, f"data.datasets={json.dumps(datasets)}", "data.valid_name=[asked]",
        "data.train_type=shuffle", "data.batch_size=6", "epoch=2", "eval.epoch_interval=1",
        "data.batch_size_val=9", "data.valid_steps=1", "generate.batch_size=4",
        "generate.max_new_tokens=8", "dist.precision=fp32", "ckpt.keep_last=9",
        "model.image_encoder.param.norm_layer=groupnorm1",
        f"model.decoder.config={json.dumps({**T5, 'dropout_rate': 0.0})}",
    )  # fmt: skip
    vqa(*flags, "data.exp_name=plain", stage=2)
    vqa(*flags, "data.exp_name=shared", *TWO, f"dist.param={{config: {settings}}}", stage=2)
    half, end = (row["step"] for row in launch.rows("shared") if "asked/accuracy" in row)
    assert_alike(launch, half)
    # from its checkpoint at half time by another stage, on one process
    shutil.rmtree(launch.output / "shared" / "checkpoints" / f"step_{end}")
    done = vqa(*flags, "data.exp_name=shared", "--nproc_per_node=1", TWO[1], stage=2)
    assert f"from step {half}" in done.stdout
    assert_alike(launch, end)


def assert_alike(launch, step):
    """Both runs' losses, and what their evaluation after ``step`` heard and found."""
    plain, shared = launch.losses("plain"), launch.losses("shared")
    assert len(plain) == len(shared) == 2 * 6
    assert shared == pytest.approx(plain, rel=1e-5)
    figures, texts = [], []
    for name in ("plain", "shared"):
        row = next(r for r in launch.rows(name) if "asked/accuracy" in r and r["step"] == step)
        figures.append({key: value for key, value in row.items() if "/" in key})
        samples = launch.output / name / "samples" / f"asked.step_{step}.jsonl"
        texts.append(samples.read_text().splitlines())
    assert figures[0] == figures[1]
    assert texts[0] == texts[1] and len(texts[0]) == 9


def test_zero_without_deepspeed_is_said_before_data_is_read(caption, without_deepspeed):
    wrong = ("dist.name=deepspeed", "dist.param={zero_stage: 3}", "data.train_name=[nothing]")
    for mode in ("train", "check"):
        done = caption(*wrong, f"--mode={mode}", code=2)
        mistake(done, "dist.name", "not installed", "pip install -e '.[deepspeed]'")


def test_fsdp2_computes_what_one_process_does(caption, launch):
    """Also what it says: seven images, four of them for one rank."""
    flags = ("epoch=1", "eval.epoch_interval=1", "eval.captions.num_images=7",
             "generate.batch_size=4")  # fmt: skip
    caption("data.exp_name=plain", *flags)
    caption("data.exp_name=shared", *flags, "--nproc_per_node=2", "dist.name=fsdp2")
    pairs = zip(launch.losses("plain"), launch.losses("shared"), strict=True)
    assert max(abs(one - two) for one, two in pairs) <= 1e-5
    said = [launch.output / name / "samples" / "tiny.step_4.jsonl" for name in ("plain", "shared")]
    assert said[0].read_text() == said[1].read_text()
