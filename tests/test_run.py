"""Runs: what opens, what is missing, and the task that a run records."""

import pytest
import torch

from engine.config import schema
from engine.config.load import load, resolved_yaml
from engine.errors import UserError
from engine.run import Run, is_run

CPU = torch.device("cpu")


def test_what_is_no_run(tmp_path):
    with pytest.raises(UserError, match=r"no does not exist: there is no config\.yaml") as raised:
        Run.open(tmp_path / "no", "vqa", key="here")
    assert raised.value.key == "here"
    with pytest.raises(UserError, match="is not the folder of a run"):
        Run.open(tmp_path, "vqa", key="here")
    assert not is_run(tmp_path)
    (tmp_path / "config.yaml").write_text("epoch: 1\n", encoding="utf8")
    assert is_run(tmp_path)
    with pytest.raises(UserError, match="no tokenizer: it is not a run of --task=vqa"):
        Run.open(tmp_path, "vqa", key="here")


def config(folder, text):
    folder.mkdir()
    (folder / "config.yaml").write_text(text, encoding="utf8")
    return folder


def test_a_run_of_another_task_is_named_with_both(tmp_path):
    path = config(tmp_path / "run", "task: clip\n")
    with pytest.raises(UserError, match="is a run of --task=clip; one of --task=vqa is needed"):
        Run.open(path, "vqa", key="here")
    with pytest.raises(UserError, match="of a run of --task=clip, not of --task=vqa") as raised:
        Run("vqa", load(path / "config.yaml"), CPU)
    assert raised.value.key == "task"
    Run("clip", load(path / "config.yaml"), CPU)
    Run("vqa", load(path / "config.yaml", ["task=null"]), CPU)
    Run("linear_probe", load(path / "config.yaml"), CPU)  # of the tower of any run


def test_the_task_is_recorded_and_not_inherited(tmp_path):
    run = Run("caption", load(config(tmp_path / "old", "epoch: 1\n") / "config.yaml"), CPU)
    path = config(tmp_path / "new", resolved_yaml(run.config))
    assert load(path / "config.yaml").task == "caption"
    below = config(tmp_path / "below", "base: ../new/config.yaml\n")
    assert load(below / "config.yaml").task is None


def test_a_task_from_outside_is_a_class(tmp_path, monkeypatch):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "task.py").write_text("def build(config, tokenizer): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="'build' must be a class that derives from"):
        _ = Run("outside.task", schema.Config(), CPU).task
