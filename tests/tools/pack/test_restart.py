"""Packing that was interrupted, and packed data that was damaged."""

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from engine.errors import FaultError
from engine.tools.pack.forms import TarShards
from tests.tools.pack.packing import csv_folder, digests, records, run

ROOT = Path(__file__).parents[3]


def _state(folder):
    paths = (path for path in folder.rglob("0*") if path.parent.name != ".engine_cache")
    return {path: path.stat().st_mtime_ns for path in paths}


@pytest.mark.parametrize("to", ["webdataset", "csv"])
def test_finished_shards_are_kept(tmp_path, to):
    source = csv_folder(tmp_path / "a")
    flags = (f"--to={to}", "--shard-size=2")
    first = run(source, tmp_path / "b", *flags)
    before = _state(tmp_path / "b")
    stats = next((tmp_path / "b").rglob("00001_stats.json"))
    stats.unlink()
    again = run(source, tmp_path / "b", *flags)
    assert "in 4 shards (3 kept from before)" in again and digests(again) == digests(first)
    changed = {path.name for path, when in _state(tmp_path / "b").items() if before[path] != when}
    content = {"00001.tar"} if to == "webdataset" else {"00001", "00001.csv"}
    assert content <= changed and all(name.startswith("00001") for name in changed)


@pytest.mark.parametrize("to", ["webdataset", "csv"])
def test_a_flipped_byte_is_found_and_mended(tmp_path, to):
    source = csv_folder(tmp_path / "a")
    flags = (f"--to={to}", "--shard-size=2")
    run(source, tmp_path / "b", *flags)
    ending = "00002.tar" if to == "webdataset" else "00002/000020.jpg"
    path = tmp_path / "b" / "train" / ending
    if to == "csv":
        path = sorted((tmp_path / "b" / "train" / "00002").iterdir())[0]
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data)
    again = run(source, tmp_path / "b", *flags)
    assert f"{tmp_path / 'b' / 'train' / '00002'}" in again and "was damaged" in again
    assert "(3 kept from before)" in again
    assert records(tmp_path / "b", to) == records(source, "csv")


def test_a_byte_that_changes_while_it_is_written_is_a_fault(tmp_path, monkeypatch):
    """A disk that gives back something else than it was given."""
    source = csv_folder(tmp_path / "a")

    writing = TarShards.writing

    @contextmanager
    def writing_lies(form, shard):
        with writing(form, shard) as add:
            yield lambda key, image, *more: add(key, image[:-3] + b"\0\0\0", *more)

    monkeypatch.setattr(TarShards, "writing", writing_lies)
    printed = run(source, tmp_path / "b", "--to=webdataset", code=1)
    assert "00000.tar does not hold what was read from the source" in printed


def test_a_shard_that_cannot_be_read_back_is_a_fault(tmp_path, monkeypatch):
    source = csv_folder(tmp_path / "a")
    monkeypatch.setattr(TarShards, "checksum", lambda form, number: None)
    printed = run(source, tmp_path / "b", "--to=webdataset", code=1)
    assert "cannot be read back after it was written" in printed
    assert not list((tmp_path / "b").rglob("*_stats.json"))
    assert issubclass(FaultError, RuntimeError)


NUMBER = 150  # enough not to be done before the signal comes


def _start(source, dest):
    words = ["-m", "engine.tools.pack", str(source), str(dest), "--to=webdataset"]
    return subprocess.Popen(
        [sys.executable, *words, "--shard-size=1", "--jobs=2"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def _after_some_shards(process, folder, number):
    deadline = time.monotonic() + 60
    while len(list(folder.glob("*_stats.json"))) < number:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.005)


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_packing_goes_on(tmp_path, sent):
    source = csv_folder(tmp_path / "a", number=NUMBER)
    folder = tmp_path / "b" / "train"
    process = _start(source, tmp_path / "b")
    _after_some_shards(process, folder, 5)
    os.kill(process.pid, sent)
    out, err = process.communicate(timeout=60)
    kept = len(list(folder.glob("*_stats.json")))
    assert 5 <= kept < NUMBER
    if sent == signal.SIGINT:
        assert process.returncode == 130 and out == ""
        assert f"stopped: {kept} of {NUMBER} shards of train are finished" in err
        assert "Traceback" not in err
    time.sleep(0.2)  # the workers end with their parent
    assert len(list(folder.glob("*_stats.json"))) == kept
    again = run(source, tmp_path / "b", "--to=webdataset", "--shard-size=1")
    assert f"({kept} kept from before)" in again
    assert not list(folder.glob(".*.making"))
    whole = f"--shard-size={NUMBER}"
    fresh = run(source, tmp_path / "c", "--to=webdataset", whole)
    assert digests(fresh) == digests(again)
