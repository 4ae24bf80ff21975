"""A process that saves without pause is killed at random moments: nothing is lost or mixed."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch

from engine.train.checkpoint import CheckpointStore, open_checkpoint

_SERVER = """
import os, sys, torch
from engine.train.checkpoint import CheckpointStore
torch.set_num_threads(1)

def work(folder, report):
    with CheckpointStore(folder, 2) as store:
        latest = store.latest()
        turn = latest.state()["turn"] if latest else 0
        while True:
            turn += 1
            step = turn - turn % 2  # each step twice: the second save replaces the first
            model = {f"w{i}": torch.full((20_000,), turn) for i in range(4)}
            state = {"turn": turn, "optimizer": {i: torch.full((20_000,), turn) for i in range(4)}}
            store.save(step, model=model, state=state, config_text=str(turn), metric=turn % 7)
            store.wait()
            os.write(report, f"{turn}\\n".encode())

for line in sys.stdin:
    report = os.open(sys.argv[2], os.O_WRONLY | os.O_TRUNC | os.O_CREAT)
    child = os.fork()
    if child == 0:
        work(sys.argv[1], report)
    os.close(report)
    print(child, flush=True)
    os.waitpid(child, 0)
    print("dead", flush=True)
"""


def no_warning(text):
    raise AssertionError(text)


def hidden(folder):
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def check_whole(checkpoint):
    """Every tensor and text of it comes from one save."""
    turn = int((checkpoint.path / "config.yaml").read_text())
    state = checkpoint.state()
    tensors = [*checkpoint.model().values(), *state["optimizer"].values()]
    assert len(tensors) == 8 and state["turn"] == turn
    assert all(torch.equal(tensor, torch.full((20_000,), turn)) for tensor in tensors)
    assert checkpoint.step == turn - turn % 2 and checkpoint.metric == turn % 7
    return turn


def kill_repeatedly(tmp_path, num_kills):
    """Kills a process that saves without pause; returns how many kills hit a save half done."""
    folder, report, draw = tmp_path / "checkpoints", tmp_path / "report", random.Random(0)
    server = subprocess.Popen(
        [sys.executable, "-c", _SERVER, folder, report],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
    )  # fmt: skip
    assert server.stdin is not None and server.stdout is not None
    num_hits = 0
    for _ in range(num_kills):
        server.stdin.write("go\n")
        child = int(server.stdout.readline())
        time.sleep(draw.uniform(0.02, 0.15))
        os.kill(child, signal.SIGKILL)
        assert server.stdout.readline() == "dead\n"
        num_hits += bool(hidden(folder))
        latest = CheckpointStore(folder, 2).latest(no_warning)
        acknowledged = report.read_text().split()
        if latest is None:
            assert not acknowledged
            continue
        assert check_whole(latest) >= int((acknowledged or ["0"])[-1])
        for step in CheckpointStore(folder).steps():
            check_whole(open_checkpoint(folder / f"step_{step}"))
        assert not hidden(folder)
    server.stdin.close()
    assert server.wait(30) == 0
    return num_hits


def test_a_kill_at_any_moment_leaves_intact_checkpoints(tmp_path):
    assert kill_repeatedly(tmp_path, 20) > 0


@pytest.mark.slow
def test_fifty_kills(tmp_path):
    assert kill_repeatedly(tmp_path, 50) > 10
