"""Whole runs, as a user starts them."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

import launch as launcher
from engine.metrics import captions

ROOT = Path(__file__).parents[2]
TINY = Path(__file__).with_name("tiny.yaml")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def interrupted(work):
    """``work``, with Ctrl-C before its first call alone: a second one would end this process."""
    first = iter([True])

    def call(*given, **options):
        if next(first, False):
            os.kill(os.getpid(), signal.SIGINT)
        return work(*given, **options)

    return call


class Launcher:
    """Starts launch.py on tiny.yaml with its data and output in temporary folders."""

    def __init__(self, data: Path, output: Path) -> None:
        self.data, self.output = data, output

    def command(self, *flags: str, cfg: Path = TINY) -> list[str]:
        overrides = [f"data.data_path={self.data}", f"ckpt.dir={self.output}"]
        return [sys.executable, "launch.py", "--task=clip", f"--cfg={cfg}", *overrides, *flags]

    def __call__(self, *flags: str, cfg: Path = TINY, code: int | None = 0):
        """Run to the end; one process in this one, which saves it the imports."""
        command = self.command(*flags, cfg=cfg)
        if any(flag.startswith("--nproc_per_node") for flag in flags):
            done = subprocess.run(
                command, cwd=ROOT, env=ENVIRONMENT, timeout=300, capture_output=True, text=True
            )
        else:
            out, err = io.StringIO(), io.StringIO()
            with chdir(ROOT), redirect_stdout(out), redirect_stderr(err):
                returned = launcher.main(command[2:])
            done = subprocess.CompletedProcess(command, returned, out.getvalue(), err.getvalue())
        assert code is None or done.returncode == code, done.stdout + done.stderr
        return done

    def start(self, *flags: str) -> subprocess.Popen:
        return subprocess.Popen(
            self.command(*flags), cwd=ROOT, env=ENVIRONMENT, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def rows(self, exp_name: str = "tiny") -> list[dict]:
        text = (self.output / exp_name / "metrics.jsonl").read_text(encoding="utf8")
        return [json.loads(line) for line in text.splitlines()]

    def losses(self, exp_name: str = "tiny") -> list[float]:
        return [row["loss"] for row in self.rows(exp_name) if "loss" in row]

    def weights(self, step: int, exp_name: str = "tiny") -> bytes:
        folder = self.output / exp_name / "checkpoints" / f"step_{step}"
        return (folder / "model.safetensors").read_bytes()


DATA = {
    "tiny": {
        "format": "shapes", "style": "flat", "num_train": 48, "num_valid": 16, "image_size": 32,
    }
}  # fmt: skip
SMALL = (
    "--task=caption", "dist.precision=fp32", f"data.datasets={json.dumps(DATA)}",
    "data.train_name=[tiny]",
    "data.valid_name=[tiny]", "data.batch_size=12", "data.batch_size_val=8", "data.num_workers=0",
    "epoch=1", "log.tensorboard=false", "transforms.resize.size=[32, 32]", "dist.num_threads=1",
    "data.exp_name=tiny", "eval.epoch_interval=null",
)  # fmt: skip


def mistake(done, *told):
    """Exit code 2, and one line that says all of it."""
    printed = done.stdout + done.stderr
    assert done.returncode == 2, printed
    assert len(printed.strip().splitlines()) == 1, printed
    for word in told:
        assert word in printed


@pytest.fixture
def meteor():
    """Asks for the real METEOR, which takes seconds to load its tables."""


@pytest.fixture(autouse=True)
def quick_meteor(request, monkeypatch):
    """A constant in METEOR's place in runs of this process, where a test does not ask for it."""

    def constant(references, candidates):
        return 0.5, [0.5] * len(references)

    if "meteor" not in request.fixturenames:
        monkeypatch.setitem(captions._BY_JAVA, "METEOR", constant)


@pytest.fixture
def caption(launch):
    """launch.py --task=caption on a shipped configuration, made small."""

    def started(*flags, kind="causal", code=0, cfg=None):
        cfg = cfg or ROOT / f"configs/caption/shapes_{kind}.yaml"
        return launch(*SMALL, *flags, cfg=cfg, code=code)

    return started


@pytest.fixture
def pictures(drawn_data, caption, tmp_path):
    """Five images, two of them below a folder, one that is none, and a text."""
    caption("--mode=check")  # draws the data
    root = tmp_path / "images"
    (root / "more").mkdir(parents=True)
    drawn = sorted((drawn_data / "tiny" / "valid").iterdir())[:5]
    for name, source in zip(("b", "a", "c", "more/x", "more/b"), drawn, strict=True):
        shutil.copy(source, root / f"{name}{source.suffix}")
    (root / "broken.jpg").write_bytes(b"\xff\xd8\xff no image")
    (root / "notes.txt").write_text("no image either")
    return root


@pytest.fixture(scope="session")
def drawn_data(tmp_path_factory) -> Path:
    """One folder of drawn scenes for all runs: drawing is part of the first."""
    return tmp_path_factory.mktemp("data")


@pytest.fixture
def launch(drawn_data, tmp_path) -> Launcher:
    return Launcher(drawn_data, tmp_path / "output")
