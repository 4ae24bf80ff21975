"""How many sub-batches may keep their graphs, so that they are not run forward a second time."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from engine.dist import collectives
from engine.errors import UserError

_SHARE = {"cuda": 0.9, "cpu": 0.5}  # of what may be filled; a CPU's system kills beyond
_SLACK = 1.1  # graphs differ in size from step to step


class KeepGraphs:
    """``count`` graphs are kept: as many as set, or under ``auto`` one at first, then what fits.

    Under ``auto`` the ranks agree at fixed steps (the 2nd, 4th, 8th, …: by then the optimizer's
    state exists) on what fits the fullest of them. Whatever the count, gradients are the same bit
    for bit.

    Args:
        rows: of a sub-batch, for a message.
    """

    def __init__(self, setting: Literal["auto"] | int, device: torch.device, rows: int = 1) -> None:
        self.auto = setting == "auto"
        self.count = 1 if setting == "auto" else setting
        self.device, self.rows = device, rows
        self.alone = True  # no other rank waits for this one, so that it may try again
        self._graph_bytes = 0
        self._limit = float("inf")
        self._steps = 0

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Around a forward pass that records a graph: note how much memory the graph holds."""
        if not self.auto or (self.device.type == "cpu" and self._graph_bytes):
            yield
        elif self.device.type == "cuda":
            before = torch.cuda.memory_allocated(self.device)
            yield
            held = torch.cuda.memory_allocated(self.device) - before
            self._graph_bytes = max(self._graph_bytes, held)
        else:
            storages: dict[int, int] = {}

            def note(saved: Tensor) -> Tensor:
                if not saved.is_leaf or not saved.requires_grad:  # weights are there anyway
                    storage = saved.untyped_storage()
                    storages[storage.data_ptr()] = storage.nbytes()
                return saved.detach()

            with torch.autograd.graph.saved_tensors_hooks(note, lambda saved: saved):
                yield
            self._graph_bytes = max(1, sum(storages.values()))

    def finish_step(self) -> None:
        """Count a step, and at the agreed ones keep as many graphs as fit. Every rank calls."""
        self._steps += 1
        if not self.auto or self._steps < 2 or self._steps & (self._steps - 1):
            return
        fits = self.count
        if self._graph_bytes:
            fits = max(1, self.count + int(self._room() // (_SLACK * self._graph_bytes)))
        self.count = min(collectives.all_gather_json(min(fits, self._limit)))

    def attempts(self, undo: Callable[[], object], *, alone: bool) -> Iterator[Attempt]:
        """Blocks to run one part of a step in, until memory suffices for one.

        Where it runs out, ``undo()`` and another, with fewer graphs kept. ``alone``: no other rank
        waits for this one; the block may change that by ``self.alone``.
        Raises UserError where others wait, or where no graphs are left to drop.
        """
        while True:
            self.alone, attempt = alone, Attempt()
            yield attempt
            if attempt.failure is None:
                return
            if not self.alone:
                raise UserError(
                    f"memory ran out while other ranks wait, with the graphs of {self.count} "
                    f"sub-batches kept: lower runner.keep_graphs or data.batch_size "
                    f"({attempt.failure})",
                    key="runner.keep_graphs",
                )
            if self.count <= 1:
                raise UserError(
                    f"a sub-batch of {self.rows} rows a device does not fit into memory: lower "
                    f"data.batch_size_train ({attempt.failure})",
                    key="data.batch_size_train",
                )
            undo()
            self._keep_fewer()

    def _keep_fewer(self) -> None:
        warnings.warn(f"memory ran out with the graphs of {self.count} sub-batches: keeping "
                      f"{self.count // 2}", stacklevel=2)  # fmt: skip
        self._limit = self.count = self.count // 2
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _room(self) -> float:
        """Bytes that further graphs may fill; negative where too many are kept."""
        if self.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.device)
            reachable = free + torch.cuda.memory_reserved(self.device)
            return _SHARE["cuda"] * reachable - torch.cuda.max_memory_allocated(self.device)
        # Between steps no graph lives, so that those of this count still need their memory
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", collectives.world()))
        return _SHARE["cpu"] * available() / processes - self.count * self._graph_bytes * _SLACK


class Attempt:
    """A block that may run out of memory: ``failure`` then holds the message of the error.

    The error itself is dropped, since its traceback holds the graphs.
    """

    failure: str | None = None

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> bool:
        kinds = torch.OutOfMemoryError, MemoryError  # or a CPU's allocator was refused
        if isinstance(error, kinds) or "can't allocate memory" in str(error):
            self.failure = str(error)
        return self.failure is not None


def available(root: Path = Path("/")) -> int:
    """Bytes of host memory available, by the kernel and by this container's limit."""
    found = []
    meminfo = root / "proc/meminfo"
    if meminfo.is_file():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        found.append(int(lines["MemAvailable"].split()[0]) * 1024)
    limit, used = (root / f"sys/fs/cgroup/memory.{name}" for name in ("max", "current"))
    if limit.is_file() and used.is_file() and limit.read_text().strip() != "max":
        found.append(int(limit.read_text()) - int(used.read_text()))
    return max(0, min(found, default=0))
