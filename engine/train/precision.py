"""In which number format the forward pass computes; weights and optimizer state stay fp32."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from engine.config.schema import Dist

Name = Literal["fp64", "fp32", "bf16", "fp16"]
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Precision:
    """A number format on a device."""

    name: Name
    device: torch.device

    @classmethod
    def choose(cls, config: Dist, device: torch.device) -> Precision:
        """The format that ``dist.precision`` names; ``auto`` takes what the hardware is fast in."""
        name: Name = _fastest(device) if config.precision == "auto" else config.precision
        return cls(name, device)

    def autocast(self) -> AbstractContextManager[object]:
        """Context of one forward pass.

        Enter it anew for each pass: weights that were cast without a graph in one pass would
        otherwise be taken, without one, from autocast's cache by the next.
        """
        if self.name not in _DTYPES:
            return nullcontext()
        return torch.autocast(self.device.type, _DTYPES[self.name])

    @property
    def weights(self) -> torch.dtype:
        """Of the weights: fp32, or fp64 where runs are compared to the last digit."""
        return torch.float64 if self.name == "fp64" else torch.float32


def _fastest(device: torch.device) -> Name:
    if device.type == "cuda":
        # Emulated bf16 (before Ampere) is slower than fp32
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return "bf16" if native else "fp16"
    return "bf16" if "amx_bf16" in _cpu_flags() else "fp32"


def _cpu_flags(path: Path = Path("/proc/cpuinfo")) -> set[str]:
    """Instruction sets of the first processor; none where the system does not say."""
    if not path.is_file():
        return set()
    for line in path.read_text().splitlines():
        if line.startswith("flags"):
            return set(line.split(":", 1)[1].split())
    return set()
