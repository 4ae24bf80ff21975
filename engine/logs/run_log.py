"""Where a run's rows go: one call fans a row out to metrics.jsonl and to whatever else listens.

A training row has ``step``, ``epoch``, ``lr``, the losses, ``samples_per_second``, ``data_wait``
(share of the step) and ``batch_R@1``; an evaluation row has ``step`` and ``DATASET/metric`` names:
figures and, where they depend on a choice, words that name it.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from engine.config import schema
from engine.logs.gallery import Example
from engine.logs.jsonl import JsonLines
from engine.logs.progress import Progress

METRICS_FILE = "metrics.jsonl"


class Sink(Protocol):
    """Something that takes rows. It may raise: the log then continues without it."""

    def row(self, row: dict[str, Any]) -> None: ...

    def examples(self, step: int, dataset: str, examples: Sequence[Example]) -> None: ...

    def close(self) -> None: ...


class RunLog:
    """Writes rows to metrics.jsonl, then to each sink; used as a context manager.

    metrics.jsonl is the record of the run, so a failure to write it is raised. Any other sink that
    fails is named in one warning and left out from then on.
    """

    def __init__(
        self,
        run_dir: Path,
        sinks: Sequence[Sink] = (),
        *,
        progress: Progress | None = None,
        resume_step: int | None = None,
    ) -> None:
        self._file = JsonLines(run_dir / METRICS_FILE, resume_step)
        self._progress = progress or Progress()
        self._sinks = [*sinks, self._progress]
        self._start = time.monotonic()

    def row(self, row: dict[str, Any]) -> None:
        """Log one row. Tensors and numpy scalars of one element become numbers (this waits)."""
        plain = {name: _plain(value) for name, value in row.items()}
        self._file.row(plain | {"seconds": round(time.monotonic() - self._start, 3)})
        for sink in tuple(self._sinks):
            self._guard(sink, functools.partial(sink.row, plain))

    def examples(self, step: int, dataset: str, examples: Sequence[Example]) -> None:
        """Show what an evaluation found for some images of a dataset."""
        for sink in tuple(self._sinks):
            if examples:
                self._guard(sink, functools.partial(sink.examples, step, dataset, examples))

    def message(self, text: str) -> None:
        """Print a line above the progress line."""
        with contextlib.suppress(OSError):  # a full disk, say
            self._progress.message(text)

    def close(self) -> None:
        """Close every sink; no exception comes out of one that fails."""
        for sink in tuple(self._sinks):
            self._guard(sink, sink.close)
        self._file.close()

    def _guard(self, sink: Sink, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # whatever a sink does, training continues
            self._sinks.remove(sink)
            name = type(sink).__name__
            self.message(f"warning: the {name} log stops here: {type(error).__name__}: {error}")

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class SilentLog(RunLog):
    """The log of every rank but 0: takes what a RunLog takes, and writes nothing."""

    def __init__(self) -> None:
        pass

    def row(self, row: dict[str, Any]) -> None:
        """Nothing."""

    def examples(self, step: int, dataset: str, examples: Sequence[Example]) -> None:
        """Nothing."""

    def message(self, text: str) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


def open_log(
    config: schema.Config,
    run_dir: Path,
    *,
    rank: int = 0,
    total_steps: int | None = None,
    resume_step: int = 0,
) -> RunLog:
    """The log that ``log`` and ``wandb`` of a configuration ask for; silent on ranks above 0."""
    if rank != 0:
        return SilentLog()
    progress = Progress(total_steps, config.log.step_interval)
    sinks: list[Sink] = []
    if config.log.tensorboard:  # imported here: half a second that a run without it need not wait
        from engine.logs.tensorboard import TensorBoard

        try:
            sinks.append(TensorBoard(run_dir, resume_step))
        except (ImportError, OSError) as error:
            progress.message(f"warning: no TensorBoard log: {error}")
    if config.wandb.enable:
        from engine.logs.wandb import Wandb

        settings = config.model_dump(mode="json")
        sinks.append(Wandb(config.wandb, run_dir, settings, warn=progress.message))
    return RunLog(run_dir, sinks, progress=progress, resume_step=resume_step)


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value
