import pickle

import pytest
import safetensors.torch
import torch

from engine.errors import UserError
from engine.train.checkpoint import CheckpointStore, open_checkpoint


def save(folder, *steps):
    with CheckpointStore(folder) as store:
        for step in steps:
            store.save(step, model={"w": torch.full((3,), step)}, state={}, config_text="")


def test_a_run_a_folder_of_checkpoints_and_one_of_them(tmp_path):
    save(tmp_path / "run" / "checkpoints", 1, 2)
    run = tmp_path / "run"
    for path, step in ((run, 2), (run / "checkpoints", 2), (run / "checkpoints/step_1", 1)):
        assert open_checkpoint(path).step == step
        assert open_checkpoint(str(path)).model()["w"][0] == step
    assert open_checkpoint(run / "checkpoints/step_1/model.safetensors").step is None


def test_a_damaged_one_that_is_named_is_not_replaced_by_another(tmp_path):
    save(tmp_path, 1, 2)
    (tmp_path / "step_2" / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model.safetensors is missing.*step_1") as caught:
        open_checkpoint(tmp_path / "step_2", key="ckpt.resume")
    assert caught.value.key == "ckpt.resume"
    warnings = []
    assert open_checkpoint(tmp_path, warn=warnings.append).step == 1
    assert "step_2" in warnings[0]


def test_opening_changes_nothing(tmp_path):
    save(tmp_path, 1)
    (tmp_path / ".step_2.saving-00000000").mkdir()
    open_checkpoint(tmp_path)
    assert (tmp_path / ".step_2.saving-00000000").exists()


def test_a_path_that_is_not_there_lists_what_is(tmp_path):
    save(tmp_path / "run" / "checkpoints", 5)
    with pytest.raises(
        UserError, match=r"step_6 does not exist; in .*checkpoints there is: step_5"
    ):
        open_checkpoint(tmp_path / "run/checkpoints/step_6")
    with pytest.raises(UserError, match="there is: run"):
        open_checkpoint(tmp_path / "gone" / "deep")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"holds no checkpoint; .* nothing"):
        open_checkpoint(tmp_path / "empty")


@pytest.mark.parametrize(
    "name", ["w.pt", "w.pth", "w.bin", "w.ckpt", "w.pkl", "w", "w.safetensors"]
)
@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_pickled_files_are_refused_whatever_their_name(tmp_path, name, form):
    path = tmp_path / name
    if form == "pickle":
        path.write_bytes(pickle.dumps([1.0, 2.0]))
    else:
        torch.save({"w": torch.ones(2)}, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(UserError, match=r"can run code.*weights_only=True"):
        open_checkpoint(path)


def test_a_pickled_folder_and_other_files_are_refused(tmp_path):
    (tmp_path / ".metadata").write_bytes(b"\x80\x02.")
    with pytest.raises(UserError, match="pickled"):
        open_checkpoint(tmp_path)
    (tmp_path / "notes.txt").write_text("hello, this is text")
    with pytest.raises(UserError, match="not a safetensors file"):
        open_checkpoint(tmp_path / "notes.txt")


def test_a_header_whose_length_looks_like_a_pickle_is_read(tmp_path):
    path = tmp_path / "w.safetensors"
    for width in range(2000):  # padding in the metadata brings the length to 0x0280
        safetensors.torch.save_file({"w": torch.ones(1)}, path, metadata={"x": "y" * width})
        if path.read_bytes()[:2] == b"\x80\x02":
            break
    assert path.read_bytes()[:2] == b"\x80\x02"
    assert open_checkpoint(path).model()["w"] == 1


def test_the_way_to_convert_works(tmp_path):
    import shlex
    import subprocess
    import sys

    torch.save({"state_dict": {"a": torch.ones(2), "b": torch.zeros(1)}}, tmp_path / "w.pt")
    with pytest.raises(UserError) as caught:
        open_checkpoint(tmp_path / "w.pt")
    command = shlex.split(str(caught.value).split("convert it once: ")[1])
    subprocess.run([sys.executable, *command[1:]], cwd=tmp_path, check=True)
    assert set(open_checkpoint(tmp_path / "w.safetensors").model()) == {"a", "b"}
