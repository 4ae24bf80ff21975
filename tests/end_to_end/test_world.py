"""Several processes compute what one does, on shares of the data that differ."""

import json

import pytest

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
    launch("--exp_name=whole", *FLAGS)
    launch("--exp_name=moved", "--nproc_per_node=2", *FLAGS[:1], "epoch=2", *FLAGS[2:])
    launch("--exp_name=moved", *FLAGS)
    whole, moved = launch.losses("whole"), launch.losses("moved")
    assert len(moved) == 20
    assert max(abs(a - b) for a, b in zip(whole[:4], moved[:4], strict=True)) <= 1e-9
