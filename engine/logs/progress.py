"""What a user watches: one live line in a terminal, else plain lines every few steps."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

_SMOOTHING = 0.1  # weight of the newest step time in the ETA
_REFRESH_SECONDS = 0.2
_SHOWN = (
    ("loss", "loss {:.4f}"), ("batch_R@1", "R@1 {:.1f}"), ("lr", "lr {:.2e}"),
    ("samples_per_second", "{:.0f} samples/s"), ("data_wait", "data wait {:.0%}"),
)  # fmt: skip


class Output(Console):
    """The console that rows are printed on: a run continues when nobody reads its output."""

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, soft_wrap=True, **options)

    def on_broken_pipe(self) -> None:
        """Print nothing more; by default rich would end the process."""
        self.quiet = True
        with contextlib.suppress(OSError, ValueError):
            # Else the interpreter fails when it flushes what is left at its end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Progress:
    """Prints training rows as progress and evaluation rows as a table.

    A training row is one with ``lr``. Without a terminal a line is printed every ``step_interval``
    steps, and at the first and last.
    """

    def __init__(
        self,
        total_steps: int | None = None,
        step_interval: int = 10,
        *,
        console: Console | None = None,
    ) -> None:
        self._total_steps, self._step_interval = total_steps, step_interval
        self._console = console or Output()
        self._last: tuple[int, float] | None = None  # step and time of the row before
        self._step_seconds: float | None = None
        self._printed: int | None = None  # step of the last plain line
        self._live: Live | None = None
        self._shown = float("-inf")  # when the live line was last drawn

    def row(self, row: dict[str, Any]) -> None:
        """Show one row."""
        if "lr" in row:
            self._training(row)
        elif values := {name: value for name, value in row.items() if "/" in name}:
            title = f"step {row['step']}" if "step" in row else None
            self._console.print(evaluation_table(values, title))

    def examples(self, step: int, dataset: str, examples: object) -> None:
        """Nothing: a terminal shows no images."""

    def message(self, text: str) -> None:
        """Print a line; in a terminal it goes above the live one."""
        self._console.print(Text(text))

    def close(self) -> None:
        """Leave the live line as it last was."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _training(self, row: dict[str, Any]) -> None:
        step, is_last = row["step"], row["step"] == self._total_steps
        now = time.monotonic()
        self._time(step, now)
        line = self._line(row)
        if self._console.is_terminal:
            self._show(line, now, is_last)
        elif is_last or self._printed is None or step - self._printed >= self._step_interval:
            # On multiples of the interval, so that lines of a resumed run fall on the same steps.
            self._printed = step - step % self._step_interval
            self._console.print(Text(line))

    def _show(self, line: str, now: float, is_last: bool) -> None:
        if self._live is None:
            # No refresh thread and no redirection: loader workers are forked from this process.
            self._live = Live(
                console=self._console, auto_refresh=False, redirect_stdout=False,
                redirect_stderr=False,
            )  # fmt: skip
            self._live.start()
        if is_last or now - self._shown >= _REFRESH_SECONDS:
            self._shown = now
            self._live.update(Text(line, overflow="ellipsis", no_wrap=True), refresh=True)

    def _time(self, step: int, now: float) -> None:
        if self._last is not None and step > self._last[0]:
            newest = (now - self._last[1]) / (step - self._last[0])
            before = newest if self._step_seconds is None else self._step_seconds
            self._step_seconds = before + _SMOOTHING * (newest - before)
        self._last = (step, now)

    def _line(self, row: dict[str, Any]) -> str:
        step, total = row["step"], self._total_steps
        parts = [f"step {step}/{total} {100 * step / total:.0f}%" if total else f"step {step}"]
        parts += [form.format(row[name]) for name, form in _SHOWN if row.get(name) is not None]
        if total and self._step_seconds is not None:
            parts.append(f"ETA {duration((total - step) * self._step_seconds)}")
        return "  ".join(parts)


def evaluation_table(values: dict[str, Any], title: str | None = None) -> Table:
    """``DATASET/metric`` values as a table: metrics down, datasets across."""
    table = Table(title=title, title_justify="left")
    table.add_column("")
    datasets, rows = by_dataset(values)
    for dataset in datasets:
        table.add_column(dataset, justify="right")
    for metric, found in rows:
        table.add_row(metric, *map(number, found))
    return table


def by_dataset(values: dict[str, Any]) -> tuple[list[str], list[tuple[str, list[Any]]]]:
    """Datasets, and of each metric its values for them, None where a dataset has it not."""
    datasets = list(dict.fromkeys(name.rpartition("/")[0] for name in values))
    metrics = list(dict.fromkeys(name.rpartition("/")[2] for name in values))
    rows = [(metric, [values.get(f"{each}/{metric}") for each in datasets]) for metric in metrics]
    return datasets, rows


def number(value: Any) -> str:
    """A figure as text: two decimals, three below ten, whole numbers whole; – for none."""
    if value is None:
        return "–"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.2f}" if abs(value) >= 10 else f"{value:.3f}"


def duration(seconds: float) -> str:
    """Seconds as ``1d 2h``, ``2h 05m``, ``3m 20s`` or ``12s``."""
    minutes, whole = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d {hours}h"
    if hours:
        return f"{hours}h {minutes:02d}m"
    return f"{minutes}m {whole:02d}s" if minutes else f"{whole}s"
