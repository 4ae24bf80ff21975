import os
import signal
import subprocess
import sys
import threading

import pytest

from engine.train.signals import StopRequest


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_only_asks(number):
    with StopRequest() as stop:
        assert not stop.requested and stop.name == ""
        signal.raise_signal(number)
        assert stop.requested and stop.name == signal.Signals(number).name


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_what_saves_nothing_ends_at_once(number):
    with pytest.raises(KeyboardInterrupt), StopRequest(saves=False):
        signal.raise_signal(number)


def test_the_first_name_stays_and_sigterm_may_come_again():
    with StopRequest() as stop:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            signal.raise_signal(number)
        assert stop.name == "SIGTERM"


@pytest.mark.parametrize("fails", [False, True])
def test_handlers_are_put_back(fails):
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    try:
        with StopRequest():
            assert signal.getsignal(signal.SIGTERM) != before[0]
            if fails:
                raise ValueError
    except ValueError:
        pass
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before


def test_another_thread_changes_nothing():
    seen = []

    def inside():
        with StopRequest() as stop:
            seen.append((signal.getsignal(signal.SIGTERM), stop.requested))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert seen == [(before, False)]


def _run(body: str) -> subprocess.CompletedProcess:
    code = "import os, signal, sys, time\nfrom engine.train.signals import StopRequest\n" + body
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


def test_a_second_interrupt_exits_at_once_with_130_and_flushes():
    done = _run(
        "with StopRequest():\n"
        "    print('said before', end='')\n"
        "    signal.raise_signal(signal.SIGINT)\n"
        "    try:\n"
        "        signal.raise_signal(signal.SIGINT)\n"
        "    finally:\n"
        "        print('not reached', flush=True)\n"
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "said before", "")


def test_a_stopped_run_ends_with_0():
    done = _run(
        "with StopRequest() as stop:\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    while not stop.requested: time.sleep(0.01)\n"
        "    print(stop.name)\n"
    )
    assert (done.returncode, done.stdout.strip()) == (0, "SIGTERM")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_forked_worker_dies_when_terminated_and_lives_through_an_interrupt(number):
    with StopRequest() as stop:
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), number)
            os._exit(7)
        _, status = os.waitpid(child, 0)
        assert not stop.requested
    code = os.waitstatus_to_exitcode(status)
    assert code == (-signal.SIGTERM if number == signal.SIGTERM else 7)
