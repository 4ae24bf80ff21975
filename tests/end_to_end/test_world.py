"""Several processes compute what one does, on shares of the data that differ."""

import json
import shutil
import socket
import subprocess
import sys

import pytest

from tests.end_to_end.conftest import ENVIRONMENT, ROOT

FLAGS = ("dist.precision=fp64", "epoch=5", "eval.epoch_interval=null")  # 20 steps


@pytest.mark.parametrize("world", [2, 4])
def test_loss_curve_is_that_of_one_process(launch, world):
    launch("--exp_name=one", *FLAGS)
    launch(f"--exp_name=many{world}", f"--nproc_per_node={world}", *FLAGS)
    one, many = launch.losses("one"), launch.losses(f"many{world}")
    assert len(one) == len(many) == 20
    assert max(abs(a - b) for a, b in zip(one, many, strict=True)) <= 1e-9


def test_retrieval_on_three_ranks_counts_no_image_twice(launch):
    launch("epoch=1")
    one = next(row for row in launch.rows() if "tiny/RSUM" in row)
    launch("--mode=eval", "--nproc_per_node=3", "data.batch_size=12")
    text = (launch.output / "tiny" / "evaluations.jsonl").read_text()
    many = json.loads(text.splitlines()[-1])
    assert {k: many[k] for k in one if k.startswith("tiny/")} == {
        k: v for k, v in one.items() if k.startswith("tiny/")
    }


def test_resume_at_another_world_size(launch):
    """Two processes train the first nine steps, one the rest: the curve is that of one alone."""
    launch("--exp_name=whole", *FLAGS)
    flags = (*FLAGS, "ckpt.step_interval=9", "ckpt.keep_last=9")
    launch("--exp_name=moved", "--nproc_per_node=2", *flags)
    for folder in (launch.output / "moved" / "checkpoints").iterdir():
        if int(folder.name.removeprefix("step_")) > 9:
            shutil.rmtree(folder)
    assert "from step 9" in launch("--exp_name=moved", *flags).stdout
    whole, moved = launch.losses("whole"), launch.losses("moved")
    assert len(moved) == 20
    assert max(abs(a - b) for a, b in zip(whole, moved, strict=True)) <= 1e-9


def test_two_nodes_under_torchrun(launch):
    """Two nodes, each its own torchrun on this machine, train as one process does."""
    flags = (*FLAGS[:1], "epoch=2", *FLAGS[2:])
    launch("--exp_name=one", *flags)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = launch.command("--exp_name=nodes", *flags)
    nodes = [
        subprocess.Popen(
            [
                sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--node_rank={rank}",
                "--nproc_per_node=1", "--master_addr=127.0.0.1", f"--master_port={port}",
                *command[1:],
            ],
            cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    printed = [node.communicate(timeout=300)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], printed
    one, many = launch.losses("one"), launch.losses("nodes")
    assert len(many) == 8
    assert max(abs(a - b) for a, b in zip(one, many, strict=True)) <= 1e-9
