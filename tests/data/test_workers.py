"""Workers end with the loader and with its process, and leave signals to the trainer."""

import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from engine.data import loader
from engine.data.samplers import shuffle
from engine.data.samplers.pool import SamplerInputs
from engine.errors import FaultError
from tests.data.drawn_source import Drawn, noisy

HERE = Path(__file__).parent


def pids(samples):
    return {"pid": os.getpid(), "rows": len(samples)}


def batches(make=pids, num_workers=2, length=64):
    sampler = shuffle.build(SamplerInputs([length], 4, 0))
    return loader.train_batches(
        [Drawn("a", length)], sampler, noisy, make, first_step=0, total_steps=10**6,
        steps_per_epoch=sampler.steps, rank=0, world=1, seed=0, num_workers=num_workers,
    )  # fmt: skip


def alive(pid):
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def gone(processes, seconds=15):
    end = time.monotonic() + seconds
    while any(alive(pid) for pid in processes) and time.monotonic() < end:
        time.sleep(0.05)
    return not any(alive(pid) for pid in processes)


def test_leaving_the_loader_ends_its_workers():
    running = batches()
    processes = {next(running)[1]["pid"] for _ in range(4)}
    assert len(processes) == 2
    running.close()
    assert gone(processes)


def slow(samples):
    time.sleep(0.2)
    return pids(samples)


def test_leaving_does_not_wait_for_work_that_nobody_wants():
    running = batches(slow)
    processes = {next(running)[1]["pid"] for _ in range(2)}
    start = time.monotonic()
    running.close()
    assert gone(processes)
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_to_the_whole_job_do_not_end_workers(number):
    running = batches()
    processes = {next(running)[1]["pid"] for _ in range(4)}
    for pid in processes:
        os.kill(pid, number)
    after = {next(running)[1]["pid"] for _ in range(20)}
    assert after == processes
    running.close()
    assert gone(processes)


def die(samples):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux")
def test_a_killed_worker_is_named():
    with pytest.raises((FaultError, RuntimeError), match=r"DataLoader worker .*(killed|exited)"):
        list(batches(die, num_workers=1))


PROGRAM = """
    import sys, time
    sys.path[:0] = {paths!r}
    from tests.data import test_workers
    running = test_workers.batches()
    print(*{{next(running)[1]["pid"] for _ in range(4)}}, flush=True)
    {then}
"""


def program(then):
    paths = [str(HERE.parent.parent)]
    code = textwrap.dedent(PROGRAM).format(paths=paths, then=then)
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    processes = [int(pid) for pid in process.stdout.readline().split()]
    assert len(processes) == 2, process.stderr.read()
    return process, processes


@pytest.mark.skipif(sys.platform != "linux", reason="needs the parent-death signal")
def test_workers_die_with_a_killed_parent():
    process, processes = program("time.sleep(60)")
    process.kill()
    process.wait()
    assert gone(processes, 5)


def test_an_error_in_the_trainer_ends_everything():
    process, processes = program("raise SystemExit('the trainer failed')")
    start = time.monotonic()
    _, errors = process.communicate(timeout=60)
    assert "the trainer failed" in errors
    assert gone(processes)
    assert time.monotonic() - start < 20


def test_ctrl_c_prints_one_traceback_only():
    process, processes = program("time.sleep(60)")
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert errors.count("Traceback") == 1
    assert "Process" not in errors
    assert gone(processes)


def test_workers_start_fast():
    running = batches()
    start = time.monotonic()
    next(running)
    running.close()
    assert time.monotonic() - start < 15  # measured 0.2 s on an idle core
    assert not [p for p in multiprocessing.active_children() if "pt_data" in p.name]
    assert torch.get_num_threads() >= 1
