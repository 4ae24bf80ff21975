import json
import random
import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.errors import UserError
from engine.train import checkpoint as checkpoints
from engine.train import serial
from engine.train.checkpoint import FILES, MANIFEST, Checkpoint, DamageError, Snapshot

ALL = (*FILES, MANIFEST)


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    folder = tmp_path_factory.mktemp("intact") / "step_7"
    folder.mkdir()
    model = {"a": torch.randn(50), "b": torch.ones(3, dtype=torch.bfloat16)}
    state = {"step": 7, "optimizer": {0: (torch.randn(20), 0.9)}, "seen": float("inf")}
    parts = (*serial.untie(model), *serial.flatten(state))
    Snapshot(7, 41.5, "optim:\n  lr: 1\n", *parts).write(folder)
    return folder


@pytest.fixture
def copied(intact, tmp_path):
    return shutil.copytree(intact, tmp_path / "step_7")


def test_an_intact_one_is_read_whole(intact):
    checkpoint = Checkpoint.read(intact)
    assert (checkpoint.step, checkpoint.metric) == (7, 41.5)
    assert (intact / "config.yaml").read_text() == "optim:\n  lr: 1\n"
    assert checkpoint.model()["b"].dtype == torch.bfloat16
    state = checkpoint.state()
    assert state["optimizer"][0][1] == 0.9 and state["seen"] == float("inf")


def test_the_manifest_lists_sizes_hashes_and_step(intact):
    manifest = json.loads((intact / MANIFEST).read_text())
    assert manifest["step"] == 7 and set(manifest["files"]) == set(FILES)
    for name in FILES:
        assert manifest["files"][name]["bytes"] == (intact / name).stat().st_size
        assert len(manifest["files"][name]["sha256"]) == 64


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(name=st.sampled_from(ALL), place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_anywhere_is_found_and_its_file_named(intact, name, place, bit):
    path = intact / name
    good = path.read_bytes()
    bad = bytearray(good)
    bad[int(place * len(bad))] ^= 1 << bit
    try:
        path.write_bytes(bad)
        with pytest.raises(DamageError, match=rf"^{name} "):
            Checkpoint.read(intact)
    finally:
        path.write_bytes(good)
    Checkpoint.read(intact)


def test_every_flipped_byte_of_the_manifest_is_found(copied):
    path = copied / MANIFEST
    good = path.read_bytes()
    for offset in range(len(good)):
        path.write_bytes(good[:offset] + bytes([good[offset] ^ 0x20]) + good[offset + 1 :])
        with pytest.raises(DamageError):
            Checkpoint.read(copied, contents=False)


@pytest.mark.parametrize("name", ALL)
def test_truncation_is_found_without_reading_contents(copied, name):
    good = (copied / name).read_bytes()
    for length in {0, 1, len(good) - 1, random.Random(name).randrange(len(good))}:
        (copied / name).write_bytes(good[:length])
        with pytest.raises(DamageError, match=rf"^{name} "):
            Checkpoint.read(copied, contents=False)
    (copied / name).write_bytes(good + b"\0")
    with pytest.raises(DamageError, match=rf"^{name} "):
        Checkpoint.read(copied, contents=False)


@pytest.mark.parametrize("name", ALL)
def test_a_missing_file_is_named(copied, name):
    (copied / name).unlink()
    with pytest.raises(DamageError, match=f"^{name} is missing"):
        Checkpoint.read(copied)


@pytest.mark.parametrize("name", ALL)
def test_a_file_that_cannot_be_read_is_damage(copied, name):
    (copied / name).unlink()
    (copied / name).mkdir()
    with pytest.raises(DamageError, match=f"^{name} "):
        Checkpoint.read(copied)


def test_a_folder_under_another_steps_name_is_damage(copied):
    renamed = copied.rename(copied.with_name("step_8"))
    with pytest.raises(DamageError, match="that of step 7"):
        Checkpoint.read(renamed)
    assert Checkpoint.read(renamed.rename(renamed.with_name("kept"))).step == 7


def test_another_format_is_not_guessed_at(copied, monkeypatch):
    monkeypatch.setattr(checkpoints, "_FORMAT", 2)
    with pytest.raises(DamageError, match="format is 1; this version reads 2"):
        Checkpoint.read(copied)


def test_a_bare_file_has_a_model_only(intact):
    bare = Checkpoint(intact / "model.safetensors", None)
    assert set(bare.model()) == {"a", "b"}
    with pytest.raises(UserError, match="weights only"):
        bare.state()


def test_a_bare_file_that_is_none_is_named(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{ no header here")
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        Checkpoint(tmp_path / "x.safetensors", None).model()
