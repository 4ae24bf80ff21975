"""What all forms of ``--mode=generate`` have in common: where they write, and an early end.

What an earlier call has written stays until there is something to put in its place. The first
Ctrl-C ends with what has been done so far, in a folder ``partial`` of its own; a second one ends at
once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from engine.data.bad_samples import BadRecord, BadSamples, summary
from engine.dist import collectives
from engine.errors import UserError
from engine.logs.progress import Progress, duration
from engine.logs.samples import make_writable
from engine.setup import Setup

BAD = "bad_samples.jsonl"
PARTIAL = "partial"
NUM_SHOWN = 200  # examples on a page
_TOLD_SECONDS = 10.0


class Output:
    """Where what is generated goes, and how far it is.

    Args:
        name: of what is generated: ``captions``. Its folder is ``generate.output``, or of this name
            in the run's.
        total: number of inputs.
        what: one of them: ``image``.
        clock: seconds.
    """

    def __init__(
        self,
        setup: Setup,
        name: str,
        total: int,
        what: str,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.setup, self.name, self.total, self.what = setup, name, total, what
        given = setup.config.generate.output
        self.folder = Path(given) if given else setup.run_dir / name
        self._clock, self._batches = clock, 0
        self._began = self._told = clock()

    def prepare(self) -> None:
        """Make the folder, before hours of work are done for it. Raises UserError."""
        self._began = self._told = self._clock()
        if collectives.rank() != 0:
            return
        try:
            make_writable(self.folder)
        except OSError as error:
            raise UserError(
                f"no {self.name} can be written to {self.folder}: {error.strerror}; name another "
                "folder",
                key="generate.output",
            ) from error

    @property
    def stopped(self) -> bool:
        """Whether this process was asked to end."""
        return self.setup.stop.requested

    def after_batch(self) -> bool:
        """Tell every few seconds how far all processes are; whether this one was asked to end."""
        self._batches += 1
        done = min(self.total, self._batches * self.setup.config.generate.batch_size)
        now = self._clock()
        if now - self._told >= _TOLD_SECONDS and done < self.total and collectives.rank() == 0:
            self._told = now
            rate = done / (now - self._began)
            Progress().message(
                f"{self.name}: {done:,} of {self.total:,} {self.what}s  {rate:.1f}/s  "
                f"ETA {duration((self.total - done) / rate)}"
            )
        return self.stopped

    def settle(self, done: Sequence[Any], bad: Sequence[BadRecord], nothing: str) -> Path | None:
        """The folder to write ``done`` to; None where this process has nothing to write.

        Tells which inputs were left out. Raises UserError ``nothing`` where none was of use.
        """
        stopped = collectives.any_true(self.stopped)
        if not done and not stopped:
            raise UserError(f"{nothing}: {summary(bad)}", key="generate.input")
        if collectives.rank() != 0:
            return None
        folder = self.folder
        if stopped:
            number = f"{len(done):,} of {self.total:,} {self.what}s done"
            self.setup.warn(f"{self.setup.stop.name or 'stopped'}: {number}; the rest is left out")
            if not done:
                return None
            folder = folder / PARTIAL
            folder.mkdir(exist_ok=True)
        (folder / BAD).unlink(missing_ok=True)
        if bad:
            BadSamples(folder / BAD, 1.0).add(list(bad), seen=self.total)
            self.setup.warn(f"{counted(bad, self.what)} left out: {summary(bad)}")
        return folder


def counted(things: Sequence[Any], name: str) -> str:
    """``1 caption``, ``2,000 captions``."""
    return f"{len(things):,} {name}{'s' if len(things) != 1 else ''}"


def heading(shown: Sequence[Any], every: Sequence[Any], what: str) -> str:
    """Of a page: ``2 images``, or ``The first 200 of 1,000 images``."""
    first = f"The first {len(shown)} of " if len(shown) < len(every) else ""
    return first + counted(every, what)
