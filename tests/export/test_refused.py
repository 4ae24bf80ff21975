"""What neither an export nor its runner takes, told in one line."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from engine.config.schema import Export
from engine.errors import UserError
from engine.export import onnx, run
from tests.export.models import make


def test_what_cannot_be_exported_is_told_before_it_is_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = make("clip")
    trained.task_name = "linear_probe"
    with pytest.raises(UserError, match="--task=linear_probe cannot be exported to ONNX") as caught:
        onnx.build(trained, tmp_path / "x", Export(), "export.output")
    assert caught.value.key == "export.format"
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UserError, match=r"needs onnxscript .*\[onnx\]"):
        onnx.build(make("clip"), tmp_path / "x", Export(), "export.output")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("task", "option", "wanted"),
    [("clip", "--top_k", "recognize"), ("caption", "--texts", "clip"),
     ("recognize", "--prompt", "caption"), ("recognize", "--max_new_tokens", "caption")],
)  # fmt: skip
def test_an_option_of_another_task_is_no_silent_one(task, option, wanted, monkeypatch, capsys):
    monkeypatch.setattr(run, "open_folder", lambda *given, **options: SimpleNamespace(task=task))
    assert run.main(["folder", "a.jpg", option, "3"]) == 2
    heard = capsys.readouterr()
    assert heard.err == f"{option} is for {wanted}, and folder holds --task={task}; leave it out\n"
    assert not heard.out
