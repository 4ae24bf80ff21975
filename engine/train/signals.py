"""Stopping a run: the first SIGTERM or SIGINT requests it, a second SIGINT exits at once."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from types import FrameType
from typing import Any


class StopRequest:
    """While entered, SIGTERM and SIGINT set ``requested`` and ``name`` instead of ending the run.

    The loop polls ``requested``, saves and leaves. A second SIGINT exits with 130 at once. Where
    nothing ``saves``, the first signal is a KeyboardInterrupt. Outside the main thread, where
    Python allows no handlers, entering changes nothing.
    """

    def __init__(self, *, saves: bool = True) -> None:
        self.saves = saves
        self.requested = False
        self.name = ""  # of the first signal: SIGTERM or SIGINT
        self._num_interrupts = 0
        self._pid = os.getpid()
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        self._pid = os.getpid()
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            # None: a handler that was not installed from Python and cannot be put back from it
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous = {}

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            # A forked worker inherits the handler but has no loop that polls. It must die when its
            # parent terminates it, and live through a Ctrl-C so that the parent ends its step.
            if number == signal.SIGTERM:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        if not self.requested:
            self.requested, self.name = True, signal.Signals(number).name
        self._num_interrupts += number == signal.SIGINT
        if self._num_interrupts > 1:
            for stream in (sys.stdout, sys.stderr):
                # The signal may have come in the middle of a write to this very stream
                with contextlib.suppress(Exception):
                    stream.flush()
            os._exit(130)
        if not self.saves:
            raise KeyboardInterrupt
