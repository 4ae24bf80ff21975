"""One process a device: started, sent signals, waited for; and one exit code for all of them.

Elastic agents start workers too, but neither report the exit codes of workers that were asked to
stop nor pass on a second Ctrl-C, and give 30 seconds for a save. Workers see the same environment
as under torchrun.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from engine.flags import Arguments

SAVE_SECONDS = 1800.0  # after a first signal: a large checkpoint on slow storage
PEER_SECONDS = 20.0  # after a worker failed: the others would wait for ever
HURRY_SECONDS = 10.0  # after a second Ctrl-C
_POLL_SECONDS = 0.1
_REPORT, _REPORTED = "ENGINE_REPORT_DIR", "reported"
_LIFELINE = "ENGINE_LIFELINE_FD"
Worker = subprocess.Popen[bytes]


def is_worker() -> bool:
    """Whether this process was started by us or by torchrun as one of several."""
    return "LOCAL_RANK" in os.environ


def first_to_report(code: int) -> bool:
    """True for the first of a node's workers that asks: its message is the one to print, and its
    exit ``code`` the one for all of them.

    What goes wrong in one worker ends the others with errors of their own, which may well end
    before it, and all of them meet an error in the configuration.
    """
    if _REPORT not in os.environ:
        return True
    try:
        with (Path(os.environ[_REPORT]) / _REPORTED).open("x", encoding="utf8") as file:
            file.write(str(code))
    except OSError:
        return False
    return True


def run_workers(script: Path, argv: Sequence[str], arguments: Arguments) -> int:
    """Run ``script argv`` in this node's processes and return the exit code for all of them.

    0 where every worker ended well, also after a signal; else that of the first that failed or
    reported what was wrong: 2 for a user error, 130 after a second Ctrl-C, 128 + signal for a
    worker that had nothing to save when it was stopped, and 1.
    """
    alive, lifeline = os.pipe()
    workers: list[Worker] = []
    with tempfile.TemporaryDirectory() as reports, socket.socket() as held:
        if (port := arguments.master_port) is None:
            # A free one, held so that no other process is given it. Rank 0 may still listen there:
            # both sockets allow reuse and this one never listens.
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            held.bind(("", 0))
            port = held.getsockname()[1]
        try:
            for local_rank in range(arguments.nproc_per_node):
                environment = _environment(arguments, local_rank, port)
                environment |= {_REPORT: reports, _LIFELINE: str(alive)}
                command = [sys.executable, str(script), *argv]
                # a session of its own: a terminal's Ctrl-C reaches a worker once, through us
                workers.append(
                    subprocess.Popen(
                        command, env=environment, start_new_session=True, pass_fds=(alive,)
                    )
                )
            return _Watch(workers, arguments, Path(reports) / _REPORTED).wait()
        finally:
            _kill(workers)
            os.close(alive)
            os.close(lifeline)


def _environment(arguments: Arguments, local_rank: int, port: int) -> dict[str, str]:
    count = arguments.nproc_per_node
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "OMP_NUM_THREADS": str(max(1, (cores or 1) // count)),
        **os.environ,
        "RANK": str(arguments.node_rank * count + local_rank),
        "LOCAL_RANK": str(local_rank),
        "WORLD_SIZE": str(arguments.nnodes * count),
        "LOCAL_WORLD_SIZE": str(count),
        "GROUP_RANK": str(arguments.node_rank),
        "MASTER_ADDR": arguments.master_addr or "127.0.0.1",
        "MASTER_PORT": str(port),
    }


class _Watch:
    """Waits for the workers, passing on signals, and determines the exit code."""

    def __init__(self, workers: Sequence[Worker], arguments: Arguments, report: Path) -> None:
        self._workers, self._report = workers, report
        self._first_rank = arguments.node_rank * arguments.nproc_per_node
        self._code: int | None = None  # of the first worker that failed
        self._stopping = False
        self._deadline = float("inf")

    def wait(self) -> int:
        watched = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        before = {number: signal.signal(number, self._pass_on) for number in watched}
        try:
            while running := self._running():
                self._settle()
                if time.monotonic() > self._deadline:
                    _say(f"{len(running)} processes did not end in time and were killed")
                    _kill(running)
                time.sleep(_POLL_SECONDS)
            self._settle()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if self._code == 1:  # that of the worker whose message was printed, where one had any
            with contextlib.suppress(OSError, ValueError):
                return int(self._report.read_text(encoding="utf8"))
        return self._code or 0

    def _running(self) -> list[Worker]:
        return [worker for worker in self._workers if worker.poll() is None]

    def _pass_on(self, number: int, _frame: object) -> None:
        hurry = self._stopping and number == signal.SIGINT
        if hurry:
            self._code = 130
        elif self._stopping:
            return
        self._stopping = True
        self._end_within(HURRY_SECONDS if hurry else SAVE_SECONDS)
        for worker in self._running():
            worker.send_signal(signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)

    def _settle(self) -> None:
        """Take the code of a worker that failed, and ask the others to end with it."""
        for rank, worker in enumerate(self._workers, start=self._first_rank):
            if self._code is None and worker.returncode:
                self._code = self._meaning(rank, worker.returncode)
                self._end_within(PEER_SECONDS)
                for other in self._running():
                    other.terminate()

    def _meaning(self, rank: int, code: int) -> int:
        if code < 0 and self._stopping:
            return 128 - code
        if code < 0:
            name = signal.Signals(-code).name
            hint = "; most often memory ran out" if name == "SIGKILL" else ""
            _say(f"the process of rank {rank} was killed by {name}{hint}")
        return code if code in (2, 130) else 1

    def _end_within(self, seconds: float) -> None:
        self._deadline = min(self._deadline, time.monotonic() + seconds)


def end_with_launcher() -> None:
    """In a worker: ask this process to save and end should the launcher vanish (kill -9)."""
    descriptor = os.environ.pop(_LIFELINE, None)
    if descriptor is None:
        return

    def wait() -> None:
        os.read(int(descriptor), 1)  # returns when the launcher's end of the pipe closes
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, name="lifeline", daemon=True).start()


def _kill(workers: Sequence[Worker]) -> None:
    for worker in workers:
        if worker.poll() is None:
            worker.kill()
    for worker in workers:
        worker.wait()


def _say(message: str) -> None:
    print(f"launch.py: {message}", file=sys.stderr, flush=True)
