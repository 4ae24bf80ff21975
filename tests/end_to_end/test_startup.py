"""What a run costs before it learns anything."""

import os
import subprocess
import sys

import pytest

from tests.end_to_end.conftest import ENVIRONMENT, ROOT

BARE = """
import torch; torch.set_num_threads(1)
import engine.torchvision_ops
import timm, transformers
timm.create_model("resnet10t", channels=[16, 32, 64, 128], stem_width=8, num_classes=0)
transformers.AutoModel.from_config(transformers.AutoConfig.for_model(
    "modernbert", hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
    intermediate_size=128, vocab_size=512, pad_token_id=0))
"""


def processor_seconds(command: list[str]) -> float:
    before = os.times()
    subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, check=True, capture_output=True)
    after = os.times()
    user = after.children_user - before.children_user
    return user + after.children_system - before.children_system


@pytest.mark.slow
def test_first_step_comes_soon_after_the_imports(tmp_path):
    command = [
        sys.executable, "launch.py", "--task=clip", "--cfg=configs/clip/shapes.yaml", "epoch=1",
        "data.train_steps=1", "eval.epoch_interval=null", "data.num_workers=0",
        "dist.num_threads=1", f"data.data_path={tmp_path}", f"ckpt.dir={tmp_path}",
    ]  # fmt: skip
    processor_seconds([*command, "--exp_name=drawn"])
    ratios = [
        processor_seconds([*command, f"--exp_name=run{i}"])
        / processor_seconds([sys.executable, "-c", BARE])
        for i in range(5)
    ]
    print("whole run of one step ÷ bare imports and model:", sorted(ratios))
    assert sorted(ratios)[2] <= 1.5
