"""Weights and optimizer state by parameter, out of the shares in which ZeRO keeps them, and back.

What is taken out are the state dicts of the whole model and of torch's own optimizer over it. So a
run may be gone on with at another stage, with another number of ranks, or with none of this.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.dist import collectives
from engine.errors import UserError

_LOW = torch.bfloat16, torch.float16


class Shares:
    """What ``zero`` has shared out. Every rank must call each of the methods.

    Args:
        zero: DeepSpeed's optimizer.
        optimizer: torch's within it, whose groups hold flat shares in place of parameters.
        groups: the parameters that its groups had.
        library: ``deepspeed``.
    """

    def __init__(
        self,
        zero: Any,
        optimizer: torch.optim.Optimizer,
        groups: Sequence[Sequence[nn.Parameter]],
        library: Any,
    ) -> None:
        self.zero, self.optimizer, self.utils = zero, optimizer, library.utils
        self._gather = library.zero.GatheredParameters
        self.sizes = [len(group) for group in groups]
        self.parameters: list[Any] = [parameter for group in groups for parameter in group]
        self.cut = hasattr(self.parameters[0], "ds_id")  # stage 3: parameters lie in shares, too

    def gathered(self, tensors: Any, modifier_rank: int | None = None) -> Any:
        """Within the block parameters are whole; ``modifier_rank``'s are everyone's afterwards."""
        return self._gather(tensors, modifier_rank=modifier_rank)

    def weights(self, module: nn.Module) -> dict[str, Tensor]:
        """Rank 0: the state dict of ``module`` on the CPU, in fp32. Elsewhere empty.

        What is frozen is as exact as the passes have it: nothing else is kept of it.
        """
        found: dict[str, Tensor] = {}
        known: dict[int, Tensor] = {}  # a tied tensor is one
        for name, tensor in module.state_dict(keep_vars=True).items():
            if id(tensor) not in known:
                known[id(tensor)] = self._weight(tensor)
            found[name] = known[id(tensor)]
        return found if collectives.rank() == 0 else {}

    def _weight(self, tensor: Tensor) -> Tensor:
        if tensor.requires_grad:
            return _kept(self.utils.safe_get_full_fp32_param(tensor))
        with self.gathered([tensor]):
            copy = tensor.detach().clone()
            return _kept(copy.float() if copy.dtype in _LOW else copy)

    def state_dict(self) -> dict[str, Any]:
        """Rank 0: as torch's, on the CPU. Elsewhere empty."""
        flat, values = self._example()
        state = {
            number: {
                key: _kept(self.utils.safe_get_full_optimizer_state(parameter, key))
                if _alike(value, flat)
                else value.detach().clone()
                if isinstance(value, Tensor)
                else value
                for key, value in values.items()
            }
            for number, parameter in enumerate(self.parameters if values else [])
        }
        groups, start = [], 0
        for size, group in zip(self.sizes, self.optimizer.param_groups, strict=True):
            groups.append({**group, "params": list(range(start, start + size))})
            start += size
        return {"state": state, "param_groups": groups} if collectives.rank() == 0 else {}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on from a state dict, which every rank has. Raises UserError for one of others."""
        found = [len(group["params"]) for group in saved["param_groups"]]
        if found != self.sizes:
            raise UserError(
                f"the checkpoint's optimizer has groups of {found} parameters, this run's has "
                f"{self.sizes}: what trains has changed; set optim.groups back, or start from the "
                "weights alone, by model.init",
                key="ckpt.resume",
            )
        if saved["state"]:
            self._make()
            flat, example = self._example()
            for number, values in saved["state"].items():
                for key, value in example.items():
                    if _alike(value, flat):
                        self.put(self.parameters[number], values[key], key)
            for state in self.optimizer.state.values():  # counts of steps are the same everywhere
                for key in (key for key, value in example.items() if not _alike(value, flat)):
                    count = values[key]
                    state[key] = state[key].copy_(count) if torch.is_tensor(count) else count
        for group, before in zip(self.optimizer.param_groups, saved["param_groups"], strict=True):
            group.update({key: value for key, value in before.items() if key != "params"})

    def put(self, parameter: Any, value: Tensor, key: str | None = None) -> None:
        """``value``, whole, into this rank's share of the fp32 parameter, or of its ``key``."""
        value = value.detach().float()
        if self.cut:
            size = parameter.ds_tensor.numel()
            padded = F.pad(value.flatten(), (0, size * collectives.world() - value.numel()))
            value = padded[size * collectives.rank() :][:size]
            if key is None:
                self.utils.safe_set_local_fp32_param(parameter, value)
            else:
                self.utils.safe_set_local_optimizer_state(parameter, value, key)
        elif key is None:
            self.utils.safe_set_full_fp32_param(parameter, value)
        else:
            self.utils.safe_set_full_optimizer_state(parameter, value, key)

    def _example(self) -> tuple[Tensor, dict[str, Any]]:
        """A flat share and its state, whose keys and counts are all shares'; {} before a step."""
        if not self.cut:  # by itself DeepSpeed links the first group's alone
            self.zero._hp_optimizer_states_linked = False
            self.zero._lazy_init_hp_params_optimizer_state()
        pairs = (pair for pair in self.optimizer.state.items() if pair[1])
        return next(pairs, (torch.empty(0), {}))

    def _make(self) -> None:
        """The state as a first step makes it: one by a rate of 0, on gradients of 0."""
        flats = (
            self.zero.fp32_partitioned_groups_flat
            if self.cut
            else self.zero.single_partition_of_fp32_groups
        )
        rates = [group["lr"] for group in self.optimizer.param_groups]
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0
        for number, flat in enumerate(flats):
            held = flat.grad
            flat.grad = torch.zeros_like(flat) if held is None else held
            self.zero._optimizer_step(number)
            flat.grad = held
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate


def _kept(tensor: Tensor) -> Tensor:
    """On the CPU, at rank 0; the others only helped to gather it."""
    return tensor.detach().cpu() if collectives.rank() == 0 else torch.empty(0)


def _alike(value: Any, flat: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == flat.shape
