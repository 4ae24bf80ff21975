"""When gradients are averaged over ranks: at once, or only by the backward that says so.

DDP arms its reduction in forward and reduces in whichever backward comes next. A step of many
forwards and backwards holds it back and releases it right before the last one, so that the ranks
speak once a step and backwards may come in any order. A model that lies in shares does the same in
its own way.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from engine.dist.sharded import Sharded


def hold(model: nn.Module) -> AbstractContextManager[None]:
    """Within the block no forward arms a reduction. A model that is not wrapped needs nothing."""
    if isinstance(model, Sharded):
        return model.hold()
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()


def backward(
    model: nn.Module, outputs: Sequence[Tensor], gradients: Sequence[Tensor] | None = None
) -> None:
    """As torch.autograd.backward, from ``outputs`` of ``model``, or a loss made of them."""
    if isinstance(model, Sharded):
        model.backward(outputs, gradients)
    else:
        torch.autograd.backward(outputs, gradients)


def lockstep(model: nn.Module) -> bool:
    """Whether a forward pass waits for the other ranks, so that none may try it again alone."""
    return isinstance(model, Sharded) and model.lockstep


def release(model: nn.Module, outputs: Sequence[Tensor]) -> None:
    """The next backward, which starts at ``outputs``, averages all gradients over the ranks.

    What DDP's own forward does where it is not held back.
    """
    if isinstance(model, Sharded):
        model.release()
    if isinstance(model, DistributedDataParallel):
        model.require_forward_param_sync = True  # the next step begins with rank 0's buffers
        model.reducer.prepare_for_backward(list(outputs) if model.find_unused_parameters else [])
