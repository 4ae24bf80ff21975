"""Opening a run's folder: what is missing is told."""

import pytest

from engine.errors import UserError
from engine.train.trained_run import is_run, open_run


def test_what_is_no_run(tmp_path):
    with pytest.raises(UserError, match=r"no does not exist: there is no config\.yaml") as raised:
        open_run(tmp_path / "no", "vqa", key="here", warn=print)
    assert raised.value.key == "here"
    with pytest.raises(UserError, match="is not the folder of a run"):
        open_run(tmp_path, "vqa", key="here", warn=print)
    assert not is_run(tmp_path)
    (tmp_path / "config.yaml").write_text("epoch: 1\n", encoding="utf8")
    assert is_run(tmp_path)
    with pytest.raises(UserError, match="no tokenizer: it is no run of --task=vqa"):
        open_run(tmp_path, "vqa", key="here", warn=print)
