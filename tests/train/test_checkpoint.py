import errno
import os
import pathlib
import resource

import pytest
import torch

from engine.errors import FaultError, UserError
from engine.train import checkpoint
from engine.train.checkpoint import CheckpointStore


def save(store, step, **options):
    model = {"w": torch.full((100,), float(step))}
    state = {"step": step, "optimizer": {"state": {0: {"exp_avg": torch.full((9,), step)}}}}
    store.save(step, model=model, state=state, config_text=f"step: {step}", **options)
    store.wait()


def no_warning(text):
    raise AssertionError(text)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_nothing_saved_yet(tmp_path):
    assert CheckpointStore(tmp_path / "run" / "checkpoints").latest(no_warning) is None
    assert CheckpointStore(tmp_path / "none", writer=False).latest(no_warning) is None
    assert not (tmp_path / "none").exists()


def test_what_is_saved_comes_back(tmp_path):
    store = CheckpointStore(tmp_path)
    save(store, 3, metric=1.5)
    latest = store.latest(no_warning)
    assert (latest.step, latest.metric) == (3, 1.5)
    assert (latest.path / "config.yaml").read_text() == "step: 3"
    assert torch.equal(latest.model()["w"], torch.full((100,), 3.0))
    assert latest.state()["optimizer"]["state"][0]["exp_avg"][0] == 3
    assert names(tmp_path) == ["step_3"]


@pytest.mark.parametrize(("keep", "left"), [(1, [12]), (2, [9, 12]), (3, [6, 9, 12])])
def test_the_last_ones_are_kept_by_number(tmp_path, keep, left):
    store = CheckpointStore(tmp_path, keep)
    for step in (3, 6, 9, 12):
        save(store, step)
    assert store.steps() == left


def test_the_best_is_kept_also_after_a_restart(tmp_path):
    for step, metric in enumerate([5.0, 9.0, 1.0, float("nan"), None, 4.0], start=1):
        save(CheckpointStore(tmp_path, 1), step, metric=metric)
    assert CheckpointStore(tmp_path).steps() == [2, 6]


def test_a_damaged_best_gives_way_to_an_intact_one(tmp_path):
    store = CheckpointStore(tmp_path, 1)
    save(store, 1, metric=5.0)
    save(store, 2, metric=4.0)
    (tmp_path / "step_1" / "manifest.json").unlink()
    save(store, 3, metric=1.0)
    assert store.steps() == [2, 3]


def test_saving_an_earlier_step_deletes_neither_it_nor_later_ones(tmp_path):
    store = CheckpointStore(tmp_path, 1)
    save(store, 9)
    save(store, 4)
    assert store.steps() == [4, 9]


def test_an_existing_step_is_replaced(tmp_path):
    store = CheckpointStore(tmp_path)
    save(store, 4, metric=1.0)
    save(store, 4, metric=2.0)
    assert store.latest(no_warning).metric == 2.0 and names(tmp_path) == ["step_4"]


@pytest.mark.parametrize("name", ["model.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("harm", ["flip", "unlink", "truncate"])
def test_a_damaged_one_is_named_and_the_one_before_used(tmp_path, name, harm):
    store = CheckpointStore(tmp_path)
    save(store, 1)
    save(store, 2)
    path = tmp_path / "step_2" / name
    {"flip": flip, "unlink": os.unlink, "truncate": lambda p: os.truncate(p, 5)}[harm](path)
    warnings = []
    assert store.latest(warnings.append).step == 1
    assert len(warnings) == 1 and "step_2 is damaged" in warnings[0] and name in warnings[0]


def test_nothing_starts_silently_from_zero(tmp_path):
    store = CheckpointStore(tmp_path)
    save(store, 1)
    flip(tmp_path / "step_1" / "config.yaml")
    (tmp_path / "step_2").mkdir()
    with pytest.raises(UserError, match="all checkpoints") as caught:
        store.latest(lambda text: None)
    assert "step_2: manifest.json is missing; step_1: config.yaml does not" in str(caught.value)
    assert caught.value.key == "ckpt.auto_resume"


def test_only_leftovers_of_our_own_naming_are_cleared(tmp_path):
    save(CheckpointStore(tmp_path), 1)
    for name in (
        ".step_2.saving-0123abcd",
        ".step_1.removed-0123abcd",
        ".step_1.replaced-0123abcd",
    ):
        (tmp_path / name).mkdir()
    others = [".step_2.saving", "step_2.saving-0123abcd", ".step_2.saving-mine", ".hidden", "tmp"]
    for name in others:
        (tmp_path / name).mkdir()
    CheckpointStore(tmp_path, writer=False)
    assert (tmp_path / ".step_2.saving-0123abcd").exists()
    assert CheckpointStore(tmp_path).latest(no_warning).step == 1
    assert names(tmp_path) == sorted([*others, "step_1"])


def test_a_replacement_cut_off_between_its_renames_gives_the_old_one_back(tmp_path):
    save(CheckpointStore(tmp_path), 5)
    (tmp_path / "step_5").rename(tmp_path / ".step_5.replaced-0123abcd")
    assert CheckpointStore(tmp_path).latest(no_warning).step == 5


def test_all_is_on_the_disk_before_the_rename(tmp_path, monkeypatch):
    events, fsync, rename = [], os.fsync, pathlib.Path.rename

    def noted_fsync(handle):
        events.append(pathlib.Path(f"/proc/self/fd/{handle}").readlink().name)
        fsync(handle)

    def noted_rename(path, target):
        events.append(f"{path.name} > {target.name}")
        return rename(path, target)

    store = CheckpointStore(tmp_path / "checkpoints")
    monkeypatch.setattr(checkpoint.os, "fsync", noted_fsync)
    monkeypatch.setattr(pathlib.Path, "rename", noted_rename)
    save(store, 1)
    *files, folder, renamed, parent = events
    assert set(files) == {*checkpoint.FILES, "manifest.json"}
    assert renamed == f"{folder} > step_1" and parent == "checkpoints"


def test_ranks_that_do_not_write_touch_nothing(tmp_path):
    reader = CheckpointStore(tmp_path / "checkpoints", writer=False)
    save(reader, 1)
    assert not (tmp_path / "checkpoints").exists()
    save(CheckpointStore(tmp_path / "checkpoints"), 2)
    assert reader.latest(no_warning).step == 2


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EIO])
def test_a_save_that_fails_says_why_and_leaves_the_old_ones(tmp_path, monkeypatch, code):
    store = CheckpointStore(tmp_path, 1)
    save(store, 1)

    def refuse(handle):
        raise OSError(code, os.strerror(code))

    for step in (1, 2):  # a replacement, a new one
        with monkeypatch.context() as patch, pytest.raises(FaultError) as caught:
            patch.setattr(checkpoint.os, "fsync", refuse)
            save(store, step)
        assert os.strerror(code) in str(caught.value) and "still there: step_1" in str(caught.value)
        assert names(tmp_path) == ["step_1"] and store.latest(no_warning).step == 1
    save(store, 2)
    assert store.steps() == [2]


def test_a_file_size_limit_of_the_system_is_met_with_a_clear_fault(tmp_path):
    store = CheckpointStore(tmp_path)
    save(store, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(FaultError, match=r"step_2 could not be saved: .*File too large"):
            store.save(2, model={"w": torch.zeros(10**5)}, state={}, config_text="")
            store.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert names(tmp_path) == ["step_1"] and store.latest(no_warning).step == 1


def test_a_folder_that_cannot_be_written_is_found_at_the_start(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="no checkpoints can be written") as caught:
        CheckpointStore(tmp_path / "file" / "checkpoints")
    assert caught.value.key == "ckpt.dir"
    monkeypatch.setattr("engine.train.checkpoint.os.access", lambda *_: False)
    with pytest.raises(UserError, match="Permission denied"):
        CheckpointStore(tmp_path)


def test_state_that_cannot_be_held_leaves_no_trace(tmp_path):
    with pytest.raises(TypeError, match=r"^optimizer\.hook "):
        CheckpointStore(tmp_path).save(
            1, model={}, state={"optimizer": {"hook": print}}, config_text=""
        )
    assert names(tmp_path) == []
