"""Tensors that are cut along their first dimension, a share a rank: their norm, whole, cut anew.

Ranks speak on the devices of the mesh, wherever the shares lie: those that are kept in the host's
memory belong to a group that can move nothing there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from engine.dist import collectives


def whole(tensor: Tensor, device: torch.device) -> Tensor:
    """On the CPU, at rank 0; the others only help to gather it over ``device``."""
    tensor = tensor.detach()
    if isinstance(tensor, DTensor):
        tensor = _like(tensor, tensor.to_local().to(device)).full_tensor()
    return tensor.cpu().clone() if collectives.rank() == 0 else torch.empty(0)


def share(tensor: Tensor, other: DTensor) -> DTensor:
    """This rank's share of a whole tensor of ``other``'s shape, cut as that one is and beside it.

    Rows as torch.chunk gives them out: equally many, the last ranks fewer or none.
    """
    local = other.to_local()
    rows = -(-other.shape[0] // collectives.world())
    start = min(collectives.rank() * rows, other.shape[0])
    return _like(other, tensor[start : start + len(local)].to(local.device, copy=True))


def norm(tensors: Sequence[DTensor], device: torch.device) -> float:
    """L2 norm of all shares of all tensors; waits for the device."""
    mine = nn.utils.get_total_norm([tensor.to_local() for tensor in tensors])
    square = mine.to(device, torch.float64).square()
    return float(collectives.all_reduce_(square).sqrt())


def _like(other: DTensor, local: Tensor) -> DTensor:
    return DTensor.from_local(
        local,
        other.device_mesh,
        other.placements,
        run_check=False,
        shape=other.shape,
        stride=other.stride(),
    )
