"""LARS as this engine's configurations name it: timm's, with this engine's options and defaults.

Layer-wise adaptive rates, You et al. 2017, arXiv:1708.03888.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

import engine.torchvision_ops  # noqa: F401  before timm, which imports torchvision

from timm.optim import Lars  # isort: skip


class LARS(Lars):
    """Momentum SGD whose rate in each layer is scaled by η‖w‖ / (‖g‖ + β‖w‖).

    β is the weight decay, η the trust coefficient. timm scales whatever has a weight decay. Here
    every parameter of two or more dimensions is scaled, and biases, norms and scalars are neither
    scaled nor decayed. Groups carry ``trust_coefficient``, as in checkpoints of earlier releases.
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
        for name, value in (("trust_coefficient", trust_coefficient), ("eps", eps)):
            if value < 0.0:
                raise ValueError(f"{name} is {value}, it cannot be negative")
        super().__init__(
            params, lr, momentum, weight_decay=weight_decay, nesterov=nesterov,
            trust_coeff=trust_coefficient, eps=eps, foreach=False,
        )  # fmt: skip

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        groups = self.param_groups
        self.param_groups = [part for group in groups for part in self._by_shape(group)]
        try:
            return super().step(closure)
        finally:
            self.param_groups = groups

    def _by_shape(self, group: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """A group as timm's two: layers that are scaled, vectors that are not."""
        options = {**self.defaults, **group}
        options["trust_coeff"] = group.get("trust_coefficient", options["trust_coeff"])
        layers = [parameter for parameter in group["params"] if parameter.ndim > 1]
        vectors = [parameter for parameter in group["params"] if parameter.ndim <= 1]
        yield options | {"params": layers, "always_adapt": True}
        yield options | {"params": vectors, "always_adapt": False, "weight_decay": 0.0}
