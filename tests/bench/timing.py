"""Fair measurement: candidates take turns in one process, and memory is counted exactly."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of wall time: median, and the distance of the quartiles as a share of it."""

    seconds: float
    spread: float


def interleaved(work: Mapping[str, Callable[[], Any]], repeats: int = 5) -> dict[str, Timing]:
    """Time each candidate in turns A B B A …, after one round to warm up.

    Every round runs all of them, the next in the opposite order, so that drift and other load fall
    on all alike. On CUDA each measurement waits for the device.
    """
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for number in range(-1, 2 * repeats):
        for name in list(work)[:: 1 if number % 2 else -1]:
            _wait()
            start = time.perf_counter()
            work[name]()
            _wait()
            if number >= 0:
                seconds[name].append(time.perf_counter() - start)
    return {name: _summary(values) for name, values in seconds.items()}


def in_turns(work: Mapping[str, Callable[[], Any]], repeats: int = 5) -> dict[str, list[float]]:
    """Processor seconds of each candidate, round by round, in turns A B B A, after one to warm up.

    Processor time counts what work costs and not what else runs on the machine.
    """
    found: dict[str, list[float]] = {name: [] for name in work}
    for number in range(-1, 2 * repeats):
        for name in list(work)[:: 1 if number % 2 else -1]:
            start = time.process_time()
            work[name]()
            if number >= 0:
                found[name].append(time.process_time() - start)
    return found


def ratio(over: list[float], under: list[float]) -> dict[str, float]:
    """``ratio`` and ``spread`` of a line: taken round by round, where other load is alike."""
    low, middle, high = statistics.quantiles(
        (a / max(b, 1e-9) for a, b in zip(over, under, strict=True)), n=4
    )
    return {"ratio": middle, "spread": (high - low) / max(middle, 1e-9)}


def _summary(values: list[float]) -> Timing:
    low, middle, high = statistics.quantiles(values, n=4)
    return Timing(middle, (high - low) / middle)


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
