"""Data parallelism by torch's DDP: a replica a rank, gradients averaged in backward."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from engine.config.schema import Dist
from engine.dist import collectives
from engine.errors import UserError
from engine.registry import nearest

NAMES = ("torch",)
_OPTIONS = ("bucket_cap_mb", "find_unused_parameters", "gradient_as_bucket_view")


def build(model: nn.Module, config: Dist, device: torch.device) -> nn.Module:
    """``model`` on ``device``, wrapped where there is more than one rank.

    ``dist.param`` may hold DDP's bucket_cap_mb, find_unused_parameters, gradient_as_bucket_view.
    What is to stay frozen must be so by now.
    """
    for name in config.param:
        if name not in _OPTIONS:
            raise UserError(
                f"dist.name {config.name} has no param {name!r}; {nearest(name, list(_OPTIONS))}",
                key=f"dist.param.{name}",
            )
    model = model.to(device)
    if collectives.world() == 1 or not any(p.requires_grad for p in model.parameters()):
        return model
    running = any(isinstance(m, _BatchNorm) and m.track_running_stats for m in model.modules())
    return DistributedDataParallel(
        model,
        # Without running statistics no buffer ever changes: do not send them every step
        forward_sync_buffers=running,
        **{"gradient_as_bucket_view": True, **config.param},
    )
