"""Run a function on several gloo processes from within a test.

    losses = run(train_two_steps, 2, "adamw")     # fn(*args) on ranks 0 and 1

``fn`` is a function at the top of its module; it finds torch.distributed initialised.
"""

from __future__ import annotations

import datetime
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _worker(
    rank: int, fn: Callable[..., Any], world: int, folder: str, threads: int, args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(threads)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",  # no port to find, hence none to lose
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=60),
    )
    try:
        torch.save(fn(*args), Path(folder) / f"result_{rank}")
    except BaseException:
        if not list(Path(folder).glob("error_*")):  # else likely a consequence of that one
            (Path(folder) / f"error_{rank}").write_text(traceback.format_exc())
        raise
    finally:
        dist.destroy_process_group()


def run(fn: Callable[..., Any], world: int, *args: Any, threads: int = 1) -> list[Any]:
    """Call ``fn(*args)`` on ``world`` ranks, and give their results in rank order.

    An exception on any rank stops the others and is raised here with that rank's traceback.
    """
    with tempfile.TemporaryDirectory() as folder:
        # A forked child keeps the modules that are imported already: seconds less than a spawned
        # one. It must not meet OpenMP's threads of the parent, hence one thread in each by default.
        method = "fork" if threads == 1 else "spawn"
        try:
            mp.start_processes(
                _worker, (fn, world, folder, threads, args), nprocs=world, start_method=method
            )
        except Exception as error:
            for first in Path(folder).glob("error_*"):
                raise RuntimeError(f"on rank {first.name[6:]}:\n{first.read_text()}") from error
            raise
        return [
            torch.load(Path(folder) / f"result_{rank}", weights_only=False) for rank in range(world)
        ]
