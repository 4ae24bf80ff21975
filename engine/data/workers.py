"""The lifetime of the loader's worker processes."""

from __future__ import annotations

import atexit
import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from engine.errors import FaultError

_PR_SET_PDEATHSIG = 1  # linux/prctl.h

Item = TypeVar("Item")


class Workers:
    """The switch between a loader and its workers; both hold the same byte of shared memory.

    Signals sent to a whole job (Ctrl-C, a scheduler's SIGTERM) reach the workers too, while the
    trainer is about to save: they ignore them, and end when the loader does or its process dies.
    """

    def __init__(self) -> None:
        self._closing = multiprocessing.RawValue("B", 0)  # no lock: a signal handler reads it

    @property
    def closing(self) -> bool:
        """Whether the loader is being shut down, so that work in progress is of no use."""
        return bool(self._closing.value)

    def close(self) -> None:
        """Tell the workers to leave; a SIGTERM ends them from here on."""
        self._closing.value = 1

    def start(self, worker: int) -> None:
        """Runs first in each worker."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, self._leave)
        die_with_parent()  # where that is unknown torch's own check ends it after some seconds
        import torch  # here alone: processes of the data tools start without it

        torch.set_num_threads(1)

    def _leave(self, number: int, _frame: Any) -> None:
        if self.closing:
            os._exit(0)

    @contextmanager
    def running(self, loader: Iterable[Item]) -> Iterator[Iterator[Item]]:
        """What the loader gives; names a dead worker.

        The workers are told to leave at the end, or before the interpreter would wait for them.
        """
        batches = None
        try:
            batches = iter(loader)
            atexit.register(self.close)  # once the workers run: what is registered last runs first
            yield batches
        except RuntimeError as error:
            text = str(error)
            if "DataLoader worker" not in text or "Caught" in text:
                raise
            raise FaultError(
                f"{text.splitlines()[0]} A killed data worker mostly means that memory or shared "
                "memory (/dev/shm) ran out: lower data.num_workers or the batch"
            ) from error
        finally:
            batches = None  # the last reference to it ends its workers
            self.close()
            atexit.unregister(self.close)


def die_with_parent() -> None:
    """Have this process killed when the one that started it ends, however that ends (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
