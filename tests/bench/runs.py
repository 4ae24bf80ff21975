"""What the rows that train have in common: their settings, the engine's own loop, and processes."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from engine.config.dump import resolved_yaml
from engine.config.load import load
from engine.config.schema import Config
from engine.config.yaml_source import parse, plain
from engine.data.bad_samples import BadSamples
from engine.logs.jsonl import read
from engine.logs.progress import Output, Progress
from engine.logs.run_log import METRICS_FILE, RunLog
from engine.logs.tensorboard import TensorBoard
from engine.modes.state import build_state
from engine.run import Run
from engine.train.checkpoint import CheckpointStore
from engine.train.loop import Training
from engine.train.plan import make_plan
from tests.bench.table import Options

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "clip" / "flickr8k.yaml"
QUICK_CONFIG = ROOT / "tests" / "end_to_end" / "tiny.yaml"
Loop = TypeVar("Loop", bound=Training)


def as_overrides(values: dict[str, Any]) -> list[str]:
    """Dotted keys and values as they are written on the command line."""
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]


def parse_overrides(texts: Iterable[str]) -> dict[str, Any]:
    """The inverse, by the engine's own reading of YAML (2e-3 is a number in it)."""
    pairs = (text.partition("=") for text in texts)
    roots = {key: parse(value, "command line", []) for key, _, value in pairs}
    return {key: root and plain(root) for key, root in roots.items()}


def settings(options: Options, folder: Path) -> tuple[Path, dict[str, Any]]:
    """A YAML, and what is changed in it: the data given, or else drawn; everything in ``folder``.

    Both sides of a comparison read the same images from the disk.
    """
    values: dict[str, Any] = {
        "ckpt.dir": str(folder / "output"),
        "dist.num_threads": options.threads,
        "eval.epoch_interval": 1_000_000,  # scored once, at the end
    }
    if options.data is not None:
        values["data.data_path"] = str(options.data)
    else:
        values["data.data_path"] = str(folder / "data")
        if not options.quick:  # the quick YAML has drawn data of its own
            drawn = {"format": "shapes", "num_train": 6000, "num_valid": 600, "image_size": 224}
            values |= {"data.datasets": {"drawn": drawn}}
            values |= {"data.train_name": ["drawn"], "data.valid_name": ["drawn"]}
    if options.quick and options.data is not None:
        values |= {"data.train_name": ["flickr8k"], "data.valid_name": ["flickr8k"]}
    return (QUICK_CONFIG if options.quick else CONFIG), values


def configuration(path: Path, values: dict[str, Any]) -> Config:
    return load(path, as_overrides(values))


def make_training(kind: type[Loop], run: Run, folder: Path) -> Loop:
    """The engine's loop, put together as a run does it, with all its logs; no evaluations."""
    config = run.config
    plan = make_plan(config, 1)
    state = build_state(run, plan.total_steps)
    folder.mkdir(parents=True, exist_ok=True)
    progress = Progress(plan.total_steps, console=Output(file=io.StringIO()))
    return kind(
        config,
        resolved_yaml(config),
        run.task,
        plan,
        state,
        CheckpointStore(folder / "checkpoints", 1),
        BadSamples(folder / "bad_samples.jsonl", config.data.max_bad_fraction),
        RunLog(folder, [TensorBoard(folder)], progress=progress),
        run.stop,
        run.device,
        evaluate=dict,
        best_metric=lambda metrics: None,
    )


def make_run(config: Config, task: str = "clip") -> Run:
    """One process on the CPU."""
    import torch

    return Run(task, config, torch.device("cpu"))


@dataclass(frozen=True, slots=True)
class Finished:
    """What a process took: its own and its workers' processor time, and its own peak memory."""

    cpu_seconds: float
    peak_mib: float


def run_process(command: list[str], log: Path, threads: int) -> Finished:
    """Run a command from the repository's root to its end. Raises RuntimeError where it fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf8") as output:
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        child = subprocess.Popen(
            command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, env=environment
        )
        peak_kib, done = 0, 0
        while not done:  # the kernel's own record of a child begins with its parent's memory
            peak_kib = max(peak_kib, high_water_kib(child.pid))
            done, status, usage = os.wait4(child.pid, os.WNOHANG)
            time.sleep(0.05)
    child.returncode = os.waitstatus_to_exitcode(status)  # waited for already
    if child.returncode:
        end = "\n".join(log.read_text(encoding="utf8").splitlines()[-15:])
        raise RuntimeError(f"{' '.join(command)} ended with {child.returncode}; {log}:\n{end}")
    seconds = usage.ru_utime + usage.ru_stime
    return Finished(seconds, peak_kib / 2**10)


def high_water_kib(pid: int | str = "self") -> int:
    """A process's largest resident memory so far; 0 where it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf8")
    except OSError:
        return 0
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    return int(found[1]) if found else 0


def launch(
    path: Path, values: dict[str, Any], name: str, threads: int
) -> tuple[dict[str, float], Finished]:
    """Train by launch.py in a process of its own: (last evaluation's figures, what it took)."""
    folder = Path(values["ckpt.dir"]) / name
    command = [sys.executable, "launch.py", "--task=clip", f"--cfg={path}", f"--exp_name={name}"]
    finished = run_process([*command, *as_overrides(values)], folder / "console.txt", threads)
    return evaluation(folder), finished


def evaluation(folder: Path) -> dict[str, float]:
    """The last evaluation's figures in a run's folder."""
    rows = [r for r in read(folder / METRICS_FILE) if any(n.endswith("/RSUM") for n in r)]
    if not rows:
        raise RuntimeError(f"no evaluation in {folder / METRICS_FILE}")
    return {name: value for name, value in rows[-1].items() if "/" in name}
