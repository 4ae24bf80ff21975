"""In which number format the forward pass computes; weights and optimizer state stay fp32."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal

import torch

from engine.config.schema import Dist

Name = Literal["fp64", "fp32", "bf16", "fp16"]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Precision:
    """A number format on a device."""

    name: Name
    device: torch.device

    @classmethod
    def choose(cls, config: Dist, device: torch.device) -> Precision:
        """The format that ``dist.precision`` names; ``auto`` takes what the hardware is fast in."""
        name: Name = "fp32"
        if config.precision != "auto":
            name = config.precision
        elif device.type == "cuda":  # emulated bf16 (before Ampere) is slower than fp32
            name = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        elif torch.cpu.get_capabilities().get("amx_bf16"):
            name = "bf16"
        return cls(name, device)

    def autocast(self) -> AbstractContextManager[object]:
        """Context of one forward pass.

        Enter it anew for each pass: weights that were cast without a graph in one pass would
        otherwise be taken, without one, from autocast's cache by the next.
        """
        dtype = DTYPES.get(self.name)
        return torch.autocast(self.device.type, dtype, enabled=dtype is not None)

    @property
    def weights(self) -> torch.dtype:
        """Of the weights: fp32, or fp64 where runs are compared to the last digit."""
        return torch.float64 if self.name == "fp64" else torch.float32
