"""When gradients are averaged over ranks: at once, or only by the backward that says so.

DDP arms its reduction in forward and reduces in whichever backward comes next. A step of many
forwards and backwards holds it back and releases it right before the last one, so that the ranks
speak once a step and backwards may come in any order.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def hold(model: nn.Module) -> AbstractContextManager[None]:
    """Within the block no forward arms a reduction. A model that is not wrapped needs nothing."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()


def release(model: nn.Module, outputs: Sequence[Tensor]) -> None:
    """The next backward, which starts at ``outputs``, averages all gradients over the ranks.

    What DDP's own forward does where it is not held back.
    """
    if isinstance(model, DistributedDataParallel):
        model.require_forward_param_sync = True  # the next step begins with rank 0's buffers
        model.reducer.prepare_for_backward(list(outputs) if model.find_unused_parameters else [])
