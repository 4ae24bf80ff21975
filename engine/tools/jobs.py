"""Work of the data tools in several processes, with a progress bar, ended at once by Ctrl-C."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from engine.data.workers import die_with_parent
from engine.errors import FaultError, UserError

_POLL_SECONDS = 0.2
_MAX_JOBS = 16

Tick = Callable[[int], None]
Item = TypeVar("Item")
Result = TypeVar("Result")
_shared: Any = None
_counter: Any = None


class Parser(argparse.ArgumentParser):
    """A command line whose mistakes are UserErrors."""

    def error(self, message: str) -> None:  # type: ignore[override]
        raise UserError(f"command line: {message}; see {self.prog} --help")


def count(text: str) -> int:
    """A whole number of at least 1, for a command line."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 1 or more")
    return int(text)


def default_jobs() -> int:
    """As many processes as this one has cores, at most 16."""
    bound = getattr(os, "sched_getaffinity", None)  # absent outside Linux
    return min(_MAX_JOBS, len(bound(0)) if bound else os.cpu_count() or 1)


@contextmanager
def progress_bar(title: str, total: int, console: Console) -> Iterator[Tick]:
    """A bar in a terminal, nothing elsewhere; yields what is called with each number done."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    )  # fmt: skip
    shown = console.is_terminal and total > 0
    with Progress(*columns, console=console, transient=True, disable=not shown) as bar:
        task = bar.add_task(title, total=total)
        yield lambda number: bar.advance(task, number)


def each(
    work: Callable[[Any, Item, Tick], Result],
    shared: Any,
    items: Sequence[Item],
    *,
    jobs: int,
    tick: Tick,
) -> Iterator[Result]:
    """``work(shared, item, tick)`` of every item, in the order in which they end.

    ``work`` is a function of a module, ``shared`` is sent to each process once, and ``tick`` is
    called with the numbers of samples done. Raises what ``work`` raises, and FaultError where a
    process dies.
    """
    jobs = min(jobs, len(items))
    if jobs <= 1:
        yield from (work(shared, item, tick) for item in items)
        return
    # Not forked: Arrow's threads would be gone in the children, their locks not.
    context = multiprocessing.get_context("spawn")
    counter = context.Value("q", 0)
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(jobs, context, _start, (shared, counter))
    mine: set[BaseProcess] = set()
    try:
        pending: set[Future[Result]] = {pool.submit(_call, work, item) for item in items}
        mine = set(multiprocessing.active_children()) - others
        counted = 0
        while pending:
            done, pending = wait(pending, _POLL_SECONDS, FIRST_COMPLETED)
            # Without its lock, which a killed process may hold for ever.
            now = counter.get_obj().value
            tick(now - counted)
            counted = now
            for future in done:
                yield future.result()
            # The pool itself may overlook the death of a process that it started last.
            if pending and not all(process.is_alive() for process in mine):
                raise BrokenProcessPool
    except BrokenProcessPool as error:
        raise FaultError(
            "one of the processes was killed; most often memory ran out: lower --jobs, now "
            f"{jobs}, and start again"
        ) from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        mine |= set(multiprocessing.active_children()) - others
        for process in mine:
            process.terminate()
        for process in mine:
            process.join()


def _start(shared: Any, counter: Any) -> None:
    """Runs first in each process."""
    global _shared, _counter
    _shared, _counter = shared, counter
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process ends this one
    die_with_parent()  # also where the first was killed
    parent = multiprocessing.parent_process()
    if parent is not None and os.getppid() != parent.pid:  # it was killed before
        os._exit(1)


def _call(work: Callable[[Any, Any, Tick], Any], item: Any) -> Any:
    return work(_shared, item, _count)


def _count(number: int) -> None:
    with _counter.get_lock():
        _counter.value += number
