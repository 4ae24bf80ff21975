"""LARS written out (You et al. 2017, arXiv:1708.03888), as an oracle."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class LARS(torch.optim.Optimizer):
    """Momentum SGD whose rate in each layer is scaled by η‖w‖ / (‖g‖ + β‖w‖).

    β is the weight decay, η the trust coefficient. Parameters of one dimension (biases, norms,
    scalars) are neither scaled nor decayed, as is usual.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 0.001,
        nesterov: bool = False,
        eps: float = 1e-8,
    ) -> None:
        for name, value in (("lr", lr), ("momentum", momentum), ("weight_decay", weight_decay),
                            ("trust_coefficient", trust_coefficient), ("eps", eps)):  # fmt: skip
            if value < 0.0:
                raise ValueError(f"{name} is {value}, it cannot be negative")
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "weight_decay": weight_decay,
                "trust_coefficient": trust_coefficient,
                "nesterov": nesterov,
                "eps": eps,
            },
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, _adapted(parameter, group), group)
        return loss

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        momentum = state["momentum_buffer"].mul_(group["momentum"]).add_(gradient)
        if group["nesterov"]:
            momentum = gradient.add(momentum, alpha=group["momentum"])
        parameter.add_(momentum, alpha=-group["lr"])


def _adapted(parameter: Tensor, group: dict[str, Any]) -> Tensor:
    """The gradient with weight decay, scaled by the layer's trust ratio; no wait for the device."""
    gradient = parameter.grad
    assert gradient is not None
    if parameter.ndim <= 1:
        return gradient
    decay = group["weight_decay"]
    weight_norm, gradient_norm = parameter.norm(), gradient.norm()
    trust = group["trust_coefficient"] * weight_norm / (
        gradient_norm + decay * weight_norm + group["eps"]
    )  # fmt: skip
    # A layer of zeros, or one that gets no gradient, would otherwise never move again
    moves = (weight_norm > 0) & (gradient_norm > 0)
    return gradient.add(parameter, alpha=decay) * torch.where(moves, trust, 1.0)
