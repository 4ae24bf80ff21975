"""The process group of a run: who takes part, over what, on which device."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as group

from engine.config.schema import Dist
from engine.errors import FaultError, UserError


def init_process_group(dist: Dist) -> torch.device:
    """Join the processes that the launcher or torchrun started; alone, there is nothing to join.

    Returns this process's device. Raises UserError for devices that are not there, FaultError where
    the other processes cannot be reached.
    """
    if dist.num_threads:
        torch.set_num_threads(dist.num_threads)
    device = _device(dist)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        if "MASTER_ADDR" not in os.environ or "MASTER_PORT" not in os.environ:
            raise UserError(
                "WORLD_SIZE is set but not MASTER_ADDR and MASTER_PORT; start the run with "
                "launch.py --nproc_per_node=N, or with torchrun"
            )
        backend = _backend(device) if dist.backend == "auto" else dist.backend
        try:
            group.init_process_group(backend, timeout=timedelta(seconds=dist.timeout_seconds))
        except (group.DistNetworkError, group.DistStoreError) as error:
            meeting = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            raise FaultError(
                f"rank {os.environ.get('RANK')} could not meet the other processes at {meeting} "
                f"within {dist.timeout_seconds:g} s ({error}); are all nodes started, with the "
                "same address and port?"
            ) from error
    return device


def join_alone(device: torch.device) -> None:
    """A process group of this process, for a library that asks for one; where there is none yet."""
    if not group.is_initialized():
        group.init_process_group(_backend(device), store=group.HashStore(), rank=0, world_size=1)


def shutdown() -> None:
    """Leave the process group, where there is one."""
    if group.is_initialized():
        group.destroy_process_group()


def _device(dist: Dist) -> torch.device:
    kind = dist.device
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cpu":
        if dist.backend == "nccl":
            raise UserError("nccl needs GPUs, and this run is on the CPU; set dist.backend: auto",
                            key="dist.backend")  # fmt: skip
        return torch.device("cpu")
    local_rank, available = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local_rank >= available:
        raise UserError(
            f"process {local_rank} of this node needs GPU {local_rank}, but {available} are "
            "visible; start fewer processes (--nproc_per_node), or set dist.device: cpu",
            key="dist.device",
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def _backend(device: torch.device) -> str:
    return "nccl" if device.type == "cuda" else "gloo"
