"""Where a run's rows go: one call fans a row out to metrics.jsonl and to whatever else listens.

A training row has ``step``, ``epoch``, ``lr``, the losses, ``samples_per_second``, ``data_wait``
(share of the step) and ``batch_R@1``; an evaluation row has ``step`` and ``DATASET/metric`` names:
figures and, where they depend on a choice, words that name it.
"""

from __future__ import annotations

import contextlib
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
    fails is named in one warning and left out from then on. Without a ``run_dir``, as on every
    rank but 0, nothing is written or printed.
    """

    def __init__(
        self, run_dir: Path | None, sinks: Sequence[Sink] = (), *,
        progress: Progress | None = None, resume_step: int | None = None,
    ) -> None:  # fmt: skip
        self._file = JsonLines(run_dir / METRICS_FILE, resume_step) if run_dir else None
        self._progress = progress or Progress()
        self._sinks = [*sinks, self._progress]
        self._start = time.monotonic()

    def row(self, row: dict[str, Any]) -> None:
        """Log one row. Tensors and numpy scalars of one element become numbers (this waits)."""
        if self._file is None:
            return
        plain = {name: _plain(value) for name, value in row.items()}
        self._file.row(plain | {"seconds": round(time.monotonic() - self._start, 3)})
        self._each(lambda sink: sink.row(plain))

    def examples(self, step: int, dataset: str, examples: Sequence[Example]) -> None:
        """Show what an evaluation found for some images of a dataset."""
        if self._file is not None and examples:
            self._each(lambda sink: sink.examples(step, dataset, examples))

    def message(self, text: str) -> None:
        """Print a line above the progress line."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # a full disk, say
                self._progress.message(text)

    def _each(self, call: Callable[[Sink], None]) -> None:
        for sink in tuple(self._sinks):
            try:
                call(sink)
            except Exception as error:  # whatever a sink does, training continues
                self._sinks.remove(sink)
                what = f"{type(error).__name__}: {error}"
                self.message(f"warning: the {type(sink).__name__} log stops here: {what}")

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_: object) -> None:
        """Close every sink; no exception comes out of one that fails."""
        if self._file is not None:
            self._each(lambda sink: sink.close())
            self._file.close()


def open_log(
    config: schema.Config, run_dir: Path, *,
    rank: int = 0, total_steps: int | None = None, resume_step: int = 0,
) -> RunLog:  # fmt: skip
    """The log that ``log`` and ``wandb`` of a configuration ask for; silent on ranks above 0."""
    if rank != 0:
        return RunLog(None)
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
        sinks.append(Wandb(config.wandb, run_dir, settings, progress.message))
    return RunLog(run_dir, sinks, progress=progress, resume_step=resume_step)


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value
