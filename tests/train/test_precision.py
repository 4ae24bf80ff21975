"""Which number format is chosen, and that it is the one computed in."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from engine.config.schema import Dist
from engine.train.precision import Precision
from tests.train.tiny import replicas

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def test_auto_on_the_cpu_depends_on_its_matrix_units(monkeypatch: pytest.MonkeyPatch) -> None:
    amx, other = {"avx512_f": True, "amx_bf16": True}, {"avx2": True, "amx_bf16": False}
    for found, want in ((amx, "bf16"), (other, "fp32"), ({}, "fp32")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=found: found)
        assert Precision.choose(Dist(), CPU).name == want


def test_auto_on_cuda_depends_on_native_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    for native, want in ((True, "bf16"), (False, "fp16")):
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation, native=native: native
        )
        chosen = Precision.choose(Dist(), CUDA)
        assert chosen.name == want


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16"])
def test_explicit_choices_are_honoured(name: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    chosen = Precision.choose(Dist(precision=name), CPU)
    layer, x = nn.Linear(3, 2), torch.randn(4, 3)
    with chosen.autocast():
        y = layer(x)
    want = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
    assert chosen.name == name
    assert y.dtype == want
    parallel, loss = replicas(layer, name), y.float().sum()
    assert parallel.scales_loss == (name == "fp16")
    assert parallel.scale(loss) == loss * (2.0**16 if name == "fp16" else 1.0)


def test_fp64_is_of_the_weights_themselves() -> None:
    chosen = Precision.choose(Dist(precision="fp64"), CPU)
    layer = nn.Linear(3, 2).to(chosen.weights)
    with chosen.autocast():
        assert layer(torch.randn(4, 3).to(chosen.weights)).dtype == torch.float64
    assert Precision("bf16", CPU).weights == torch.float32


def test_fp16_trains_on_the_cpu() -> None:
    chosen = Precision.choose(Dist(precision="fp16"), CPU)
    layer, x = nn.Linear(3, 1), torch.randn(64, 3)
    parallel, losses = replicas(layer, "fp16"), []
    parallel.optimizer.param_groups[0]["lr"] = 0.1
    for _ in range(40):
        with chosen.autocast():
            y = layer(x)
        loss = (y.float() - x.sum(1, keepdim=True)).square().mean()
        parallel.backward([parallel.scale(loss)])
        parallel.clip(None)
        parallel.update()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.05 * losses[0]


def test_weights_cast_without_a_graph_are_cast_anew_with_one() -> None:
    """A cast cached in a pass without gradients must not swallow those of the next."""
    chosen, layer, x = Precision("bf16", CPU), nn.Linear(3, 2), torch.randn(4, 3)
    with torch.no_grad(), chosen.autocast():
        layer(x)
    with chosen.autocast():
        layer(x).float().sum().backward()
    assert layer.weight.grad is not None


def test_the_processors_capabilities_are_the_systems() -> None:
    """As Linux lists them, where it does."""
    path = Path("/proc/cpuinfo")
    told = path.is_file() and "flags" in path.read_text()
    if not told or os.environ.get("ENGINE_TEST_AMX"):
        pytest.skip("needs Linux on x86, as it is")
    flags = path.read_text().split("flags", 1)[1].split("\n", 1)[0].split()
    assert bool(torch.cpu.get_capabilities().get("amx_bf16")) == ("amx_bf16" in flags)
