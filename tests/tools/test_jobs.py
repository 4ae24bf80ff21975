"""Work in several processes."""

import os
import signal
import time

import pytest

from engine.errors import FaultError, UserError
from engine.tools import jobs


def work(shared, item, tick):
    """Squares; some items end otherwise."""
    if item == "mistake":
        raise UserError("mend this", key="data.x")
    if item == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if item == "endless":
        time.sleep(1000)
    tick(item)
    return shared["offset"] + item * item, os.getpid()


def _each(items, number):
    told = []
    results = list(jobs.each(work, {"offset": 5}, items, number, told.append))
    return [value for value, _ in results], sum(told), {pid for _, pid in results}


@pytest.mark.parametrize("number", [1, 2])
def test_results_and_progress(number):
    values, done, processes = _each(list(range(10)), number)
    assert values == [5 + i * i for i in range(10)] and done == 45
    assert (os.getpid() in processes) == (number == 1)


@pytest.mark.parametrize("number", [1, 2])
def test_a_mistake_keeps_its_kind(number):
    with pytest.raises(UserError, match="mend this") as caught:
        _each([1, "mistake"] + ["endless"] * (number - 1), number)
    assert caught.value.key == "data.x"


def test_a_killed_process_is_a_fault_and_the_others_end():
    start = time.monotonic()
    with pytest.raises(FaultError, match=r"one of the processes was killed.*lower --jobs, now 2"):
        _each(["endless", "killed"], 2)
    assert time.monotonic() - start < 60
