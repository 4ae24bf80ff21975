"""Runs over data in which a known few samples are spoilt: those are named, all others are seen."""

import json
from collections import Counter

import pytest

from engine.tasks.clip import ClipTask
from tests.data import faults
from tests.end_to_end.test_resume import kill_until_done

MAKE = {"csv": faults.csv_folder, "webdataset": faults.shards}


def settings(root, form, *more):
    return (
        f"data.datasets.faulty={{format: {form}, root: {root}}}",
        *("data.train_name=[faulty]", "data.valid_name=[]", "eval.epoch_interval=null"),
        f"data.max_caption_chars={faults.LONGEST}",
        *("transforms.train_transforms=[resize, center_crop]", "transforms.resize.size=32"),
        *("transforms.center_crop.size=32", "transforms.valid_transforms=[resize, center_crop]"),
        *more,
    )


@pytest.fixture
def seen(monkeypatch):
    """How often each row came into a batch of runs in this process."""
    counts = Counter()
    batch = ClipTask.batch

    def counted(task, samples):
        counts.update(sample.index for sample in samples)
        return batch(task, samples)

    monkeypatch.setattr(ClipTask, "batch", counted)
    return counts


def named(launch, exp_name):
    """What bad_samples.jsonl says: row → cause; no row twice."""
    text = (launch.output / exp_name / "bad_samples.jsonl").read_text(encoding="utf8")
    found = [json.loads(line) for line in text.splitlines()]
    assert all(row["dataset"] == "faulty" and row["key"] for row in found)
    causes = {row["index"]: row["cause"] for row in found}
    assert len(causes) == len(found)
    return causes


def assert_all_told(launch, seen, planted, number, epochs, exp_name):
    assert named(launch, exp_name) == planted
    assert seen == dict.fromkeys(set(range(number)) - set(planted), epochs)
    last = launch.rows(exp_name)[-1]
    assert last["samples_seen"] == epochs * (number - len(planted))


@pytest.mark.parametrize("form", MAKE)
def test_each_kind_is_told_by_its_cause(launch, seen, tmp_path, form):
    root = tmp_path / "faulty"
    planted = MAKE[form](root, 100, 1)
    assert len(planted) == 20
    flags = settings(root, form, "data.max_bad_fraction=0.3", "data.batch_size=20", "epoch=2")
    launch("--exp_name=once", *flags)
    assert_all_told(launch, seen, planted, 100, 2, "once")


def test_too_many_stop_the_run_and_are_told(launch, tmp_path):
    faults.csv_folder(tmp_path / "faulty", 100, 1)
    flags = settings(tmp_path / "faulty", "csv", "data.batch_size=100")
    told = launch(*flags, code=2).stderr
    for word in (
        "20 of 100 samples read cannot be used", "4 truncated", "3 too large", "2 missing",
        "more than data.max_bad_fraction 0.01 allows", "bad_samples.jsonl", "raise data.max_bad",
    ):  # fmt: skip
        assert word in told
    assert "Traceback" not in told


@pytest.mark.slow
@pytest.mark.parametrize("form", MAKE)
def test_sixty_faults_in_a_thousand_samples(launch, seen, tmp_path, form):
    root = tmp_path / "faulty"
    planted = MAKE[form](root, 1000, 3)
    assert len(planted) == 60
    flags = settings(root, form, "data.max_bad_fraction=0.1", "data.batch_size=25", "epoch=3")
    launch("--exp_name=whole", *flags)
    assert_all_told(launch, seen, planted, 1000, 3, "whole")
    workers = "data.num_workers=2"
    assert kill_until_done(launch, "killed", 6, *flags, "ckpt.step_interval=1", workers) >= 3
    assert named(launch, "killed") == planted
    assert launch.rows("killed")[-1]["samples_seen"] == 3 * 940
    assert launch.losses("killed") == launch.losses("whole")
    assert launch.weights(120, "killed") == launch.weights(120, "whole")
