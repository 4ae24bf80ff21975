"""Fair measurement: candidates take turns in one process, and memory is counted exactly."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds: median, and the distance of the quartiles as a share of it."""

    seconds: float
    spread: float


def in_turns(
    work: Mapping[str, Callable[[], Any]],
    repeats: int = 5,
    clock: Callable[[], float] = time.process_time,
) -> dict[str, list[float]]:
    """Seconds of each candidate, round by round, in turns A B B A …, after a round to warm up.

    Every round runs all of them, the next in the opposite order, so that drift and other load fall
    on all alike. Processor time counts what work costs and not what else runs on the machine. On
    CUDA each measurement waits for the device.
    """
    found: dict[str, list[float]] = {name: [] for name in work}
    for number, name in turns(work, repeats):
        _wait()
        start = clock()
        work[name]()
        _wait()
        if number >= 0:
            found[name].append(clock() - start)
    return found


def turns(names: Iterable[str], repeats: int) -> Iterator[tuple[int, str]]:
    """(round, name) in the order of runs; the round to warm up is -1."""
    for number in range(-1, 2 * repeats):
        for name in list(names)[:: 1 if number % 2 else -1]:
            yield number, name


def summaries(
    work: Mapping[str, Callable[[], Any]],
    repeats: int = 5,
    clock: Callable[[], float] = time.process_time,
) -> dict[str, Timing]:
    """``in_turns`` as a figure each."""
    found = in_turns(work, repeats, clock)
    return {name: Timing(statistics.median(each), spread(each)) for name, each in found.items()}


def ratio(over: list[float], under: list[float]) -> dict[str, float]:
    """``ratio`` and ``spread`` of a line: taken round by round, where other load is alike."""
    ratios = [a / max(b, 1e-9) for a, b in zip(over, under, strict=True)]
    return {"ratio": statistics.median(ratios), "spread": spread(ratios)}


def spread(values: list[float]) -> float:
    """The distance of the quartiles as a share of the median."""
    low, middle, high = statistics.quantiles(values, n=4)
    return (high - low) / max(middle, 1e-9)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_bytes(work: Callable[[], Any]) -> int:
    """The most memory that tensors took during ``work`` beyond what was held before it.

    On CUDA by the allocator's own record; on the CPU by summing the allocations and releases that
    torch's profiler sees, in order of time. Results of ``work`` are dropped.
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        work()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    held = peak = 0
    for event in events:
        held += event.nbytes()
        peak = max(peak, held)
    return peak
