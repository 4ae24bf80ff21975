"""Opening a run's folder: what is missing is told."""

import pytest

from engine.errors import UserError
from engine.run import Run, is_run


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
