"""Weights & Biases: a real offline run, and every way in which it can fail without a network."""

import subprocess
import sys
import threading
import time

import pytest
from PIL import Image

from engine.config import schema
from engine.logs.wandb import Wandb

wandb = pytest.importorskip("wandb")


@pytest.fixture(autouse=True)
def bounds(monkeypatch):
    monkeypatch.setattr("engine.logs.wandb.INIT_SECONDS", 5.0)
    monkeypatch.setattr("engine.logs.wandb.CLOSE_SECONDS", 20.0)


def opened(folder, warnings, **options):
    folder.mkdir(exist_ok=True)
    config = schema.Wandb(enable=True, **options)
    return Wandb(config, folder, {"runner": {"seed": 0}}, warnings.append)


def test_offline_for_real(tmp_path):
    """In a process of its own: wandb leaves a service and exit hooks behind."""
    code = f"""
import pathlib
from PIL import Image
from engine.config import schema
from engine.logs.gallery import Example
from engine.logs.wandb import Wandb
log = Wandb(schema.Wandb(enable=True, mode="offline", tags=["t"]), pathlib.Path({str(tmp_path)!r}),
            {{"runner": {{"seed": 0}}}}, warn=print)
for step in range(5):
    log.row({{"step": step, "loss": 1 / (step + 1)}})
log.row({{"step": 4, "coco/RSUM": float("nan"), "coco/tokenizer": "ours"}})
log.examples(4, "coco", [
    Example(Image.new("RGB", (width, 20), "red"), ["a cat", "日本"], [("said", 0.5)], "a.jpg")
    for width in (40, 50)
])
log.close()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    identity = (tmp_path / "wandb_id").read_text()
    records = list(tmp_path.glob(f"wandb/offline-run-*-{identity}/run-{identity}.wandb"))
    assert len(records) == 1
    content = records[0].read_bytes()
    assert content.count(b"loss") >= 5
    assert b"coco/RSUM" in content and b"coco/examples" in content
    assert b"said (0.50)" in content and b"own: a cat" in content
    pictures = list(records[0].parent.glob("files/media/images/coco/examples*.png"))
    sizes = [Image.open(picture).size for picture in pictures]
    assert sorted(sizes) == [(40, 20), (50, 20)]


class Fake:
    """Stands for the run that wandb.init returns."""

    def __init__(self):
        self.rows, self.finished = [], False

    def define_metric(self, *_, **__):
        pass

    def log(self, row):
        self.rows.append(row)

    def finish(self):
        self.finished = True


def test_rows_arrive_in_order(tmp_path, monkeypatch):
    run, given = Fake(), {}
    monkeypatch.setattr(wandb, "init", lambda **options: given.update(options) or run)
    warnings = []
    log = opened(tmp_path / "exp", warnings, project="p", entity="me", mode="online")
    rows = [{"step": step} for step in range(50)]
    for row in rows:
        log.row(row)
    log.close()
    assert (run.rows, run.finished, warnings) == (rows, True, [])
    assert (given["project"], given["entity"], given["name"]) == ("p", "me", "exp")
    assert given["config"] == {"runner": {"seed": 0}}
    assert given["resume"] == "allow"


def test_a_resumed_run_goes_on_in_the_same_one(tmp_path, monkeypatch):
    identities = []
    monkeypatch.setattr(wandb, "init", lambda **options: identities.append(options["id"]) or Fake())
    for _ in range(2):
        opened(tmp_path, []).close()
    assert identities[0] == identities[1]


@pytest.mark.parametrize(
    "error",
    [ConnectionError("no route\nto host"), wandb.errors.UsageError("No API key"), SystemExit(1),
     wandb.errors.CommError("timed out"), ImportError("No module named 'wandb'")],
)  # fmt: skip
def test_a_failure_is_one_line_of_warning(tmp_path, monkeypatch, error):
    def fail(**_):
        raise error

    monkeypatch.setattr(wandb, "init", fail)
    warnings = []
    log = opened(tmp_path, warnings)
    for step in range(20):
        log.row({"step": step})
        time.sleep(0.005)
    log.close()
    assert len(warnings) == 1
    assert "\n" not in warnings[0]
    assert str(error).splitlines()[0] in warnings[0]


def test_the_package_may_be_absent(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    warnings = []
    opened(tmp_path, warnings).close()
    time.sleep(0.1)
    assert len(warnings) == 1
    assert "wandb" in warnings[0]


def test_no_account_and_no_terminal(tmp_path):
    """The real client without a key fails at once instead of asking."""
    code = f"""
import pathlib
from engine.config import schema
from engine.logs import wandb
wandb.INIT_SECONDS = 5.0
log = wandb.Wandb(schema.Wandb(enable=True), pathlib.Path({str(tmp_path)!r}), {{}}, print)
log.row({{"step": 1}})
log.close()
print("went on")
"""
    environment = {
        "PATH": "/usr/bin:/bin",
        "HOME": str(tmp_path),
        "WANDB_BASE_URL": "http://127.0.0.1:9",
    }
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120,
                          stdin=subprocess.DEVNULL, env=environment)  # fmt: skip
    assert done.returncode == 0, done.stderr
    first, last = done.stdout.splitlines()
    assert first.startswith("warning: no Weights & Biases log (")
    assert last == "went on"


def test_neither_a_slow_start_nor_a_slow_end_is_waited_for(tmp_path, monkeypatch):
    release = threading.Event()
    monkeypatch.setattr(wandb, "init", lambda **_: release.wait(30) and Fake())
    monkeypatch.setattr("engine.logs.wandb.QUEUE_SIZE", 10)
    warnings = []
    start = time.monotonic()
    monkeypatch.setattr("engine.logs.wandb.CLOSE_SECONDS", 0.2)
    log = opened(tmp_path, warnings)
    for step in range(25):
        log.row({"step": step})
    assert time.monotonic() - start < 1.0
    log.close()
    assert time.monotonic() - start < 2.0
    release.set()
    assert len(warnings) == 1
