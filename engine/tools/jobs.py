"""The data tools' command lines, and their work in several processes, ended at once by Ctrl-C."""

import argparse
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from engine.data.workers import die_with_parent
from engine.errors import FaultError, UserError
from engine.flags import count

_POLL_SECONDS = 0.2
_MAX_JOBS = 16

Tick = Callable[[int], None]
Item = TypeVar("Item")
Result = TypeVar("Result")
_shared: Any = None
_counter: Any = None


class Parser(argparse.ArgumentParser):
    """A tool's command line, with ``--split`` and ``--jobs``; its mistakes are UserErrors."""

    def __init__(self, prog: str, description: str, split: str) -> None:
        codes = "Exit codes: 0 done, 1 a fault, 2 a user error, 130 stopped by Ctrl-C."
        super().__init__(prog=prog, description=description, epilog=codes, allow_abbrev=False)
        self.add_argument("--split", choices=("train", "valid"), help=f"default: {split}")
        bound = getattr(os, "sched_getaffinity", None)  # absent outside Linux
        cores = min(_MAX_JOBS, len(bound(0)) if bound else os.cpu_count() or 1)
        self.add_argument("--jobs", type=count, default=cores, metavar="N")

    def error(self, message: str) -> None:  # type: ignore[override]
        raise UserError(f"command line: {message}; see {self.prog} --help")


def console(*, stderr: bool = False) -> Console:
    """Prints texts as they are."""
    return Console(stderr=stderr, highlight=False, soft_wrap=True, markup=False, emoji=False)


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
    jobs: int,
    tick: Tick,
) -> Iterator[Result]:
    """``work(shared, item, tick)`` of every item, in order.

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
    try:
        pending = deque(pool.submit(_call, work, item) for item in items)
        mine = set(multiprocessing.active_children()) - others
        counted = 0
        while pending:
            done = wait([pending[0]], _POLL_SECONDS).done
            # Without its lock, which a killed process may hold for ever.
            now = counter.get_obj().value
            tick(now - counted)
            counted = now
            if done:
                yield pending.popleft().result()
            # The pool itself may overlook the death of a process that it started last.
            elif not all(process.is_alive() for process in mine):
                raise BrokenProcessPool
    except BrokenProcessPool as error:
        raise FaultError(
            "one of the processes was killed; most often memory ran out: lower --jobs, now "
            f"{jobs}, and start again"
        ) from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in (mine := set(multiprocessing.active_children()) - others):
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
