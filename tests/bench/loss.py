"""Our contrastive losses beside open_clip's: time in matrix products, and peak memory.

    python -m tests.bench.loss [--largest] [--threads N]

One matrix product (mm) is I Tᵀ of the whole batch, timed in the same rounds as the losses. The
limits: softmax 4 mm without S stored, sigmoid 3 mm. Every row first asserts that loss and
gradients equal the peer's.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

import engine.torchvision_ops  # noqa: F401
from engine.config import schema
from engine.registry import find
from engine.types import Features
from tests.bench.timing import peak_bytes, summaries

WIDTH = 512
Gradients = tuple[Tensor, ...]


def make_inputs(
    batch: int, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """Normalised images and texts of which equal rows are alike, scale and bias as in training."""
    generator = torch.Generator().manual_seed(0)
    image = F.normalize(torch.randn(batch, WIDTH, generator=generator), dim=1)
    noise = torch.randn(batch, WIDTH, generator=generator) / 5
    text = F.normalize(image + noise, dim=1)
    features = [x.to(device, dtype) for x in (image, text)]
    shared = [torch.tensor(x, device=device) for x in (50.0, -10.0)]
    return [x.requires_grad_() for x in (*features, *shared)]


def ours(name: str, inputs: list[Tensor]) -> Callable[[], tuple[Tensor, Gradients]]:
    """Loss and gradients by the engine."""
    loss = find("losses", name).build(schema.Loss(name=name))

    def work() -> tuple[Tensor, Gradients]:
        image, text, scale, bias = inputs
        shared = {"logit_scale": scale.log()[None], "logit_bias": bias[None]}
        value = loss(Features({"image_BD": image, "text_BD": text}, shared))["loss"]
        used = inputs if name == "Sigmoid" else inputs[:3]
        return value.detach(), torch.autograd.grad(value, used)

    return work


def peers(name: str, inputs: list[Tensor]) -> Callable[[], tuple[Tensor, Gradients]]:
    """Loss and gradients by open_clip."""
    from open_clip.loss import ClipLoss, SigLipLoss

    used = inputs if name == "Sigmoid" else inputs[:3]
    loss = SigLipLoss() if name == "Sigmoid" else ClipLoss()

    def work() -> tuple[Tensor, Gradients]:
        value = loss(*used)
        return value.detach(), torch.autograd.grad(value, used)

    return work


def assert_equal(mine: Callable, theirs: Callable) -> None:
    """Loss to 1e-5, each gradient to 1e-4 of its largest entry (both sides are fp32)."""
    (loss, gradients), (peer_loss, peer_gradients) = mine(), theirs()
    torch.testing.assert_close(loss, peer_loss, rtol=1e-5, atol=1e-5)
    for got, want in zip(gradients, peer_gradients, strict=True):
        assert (got - want).abs().max() <= 1e-4 * want.abs().max()


def compare(name: str, batch: int, repeats: int = 5) -> dict[str, float]:
    """One row: seconds, spread, mm, share of the peer's time, and peak MiB of both."""
    inputs = make_inputs(batch)
    mine, theirs = ours(name, inputs), peers(name, inputs)
    assert_equal(mine, theirs)
    image, text = (x.detach() for x in inputs[:2])
    product = torch.empty(batch, batch)
    work = {
        "mm": lambda: torch.mm(image, text.t(), out=product),
        "ours": mine,
        "peer": theirs,
    }
    times = summaries(work, repeats, time.perf_counter)
    mib = {key: peak_bytes(work[key]) / 2**20 for key in ("ours", "peer")}
    return {
        "batch": batch,
        "ours_s": times["ours"].seconds,
        "ours_spread": times["ours"].spread,
        "ours_mm": times["ours"].seconds / times["mm"].seconds,
        "peer_mm": times["peer"].seconds / times["mm"].seconds,
        "time_ratio": times["ours"].seconds / times["peer"].seconds,
        "ours_mib": mib["ours"],
        "peer_mib": mib["peer"],
        "memory_ratio": mib["peer"] / mib["ours"],
    }


def largest(batch: int = 65536) -> dict[str, float]:
    """Peak MiB of a batch that no peer's matrix fits (16 GiB of logits). Minutes on a CPU."""
    work = ours("NCE", make_inputs(batch))
    return {"batch": batch, "ours_mib": peak_bytes(work) / 2**20}


def on_cuda(name: str, batch: int = 65536, repeats: int = 5) -> dict[str, float]:
    """Milliseconds and peak MiB in bf16 on the GPU, and the time of one matrix product there."""
    inputs = make_inputs(batch, "cuda", torch.bfloat16)
    work = ours(name, inputs)
    image, text = (x.detach() for x in inputs[:2])
    half = text[: batch // 2]  # half of a product at once: the whole would hold 8 GiB
    pair = {"ours": work, "half_mm": lambda: image @ half.t()}
    times = summaries(pair, repeats, time.perf_counter)
    return {
        "batch": batch,
        "ours_ms": 1e3 * times["ours"].seconds,
        "ours_spread": times["ours"].spread,
        "ours_mm": times["ours"].seconds / (2 * times["half_mm"].seconds),
        "ours_mib": peak_bytes(work) / 2**20,
    }


def rows(batches: tuple[int, ...] = (2048, 4096, 8192)) -> Iterator[tuple[str, dict[str, float]]]:
    """What is printed, one after another: (loss, figures)."""
    for name in ("NCE", "Sigmoid"):
        for batch in batches:
            yield name, compare(name, batch)
        if torch.cuda.is_available():
            yield f"{name} cuda bf16", on_cuda(name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--largest", action="store_true", help="also the 65,536 row (minutes)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {options.threads} threads, D {WIDTH}")
    for name, figures in rows():
        print(name, *(f"{key} {value:.4g}" for key, value in figures.items()), sep="  ", flush=True)
    if options.largest:
        print("NCE", largest())


if __name__ == "__main__":
    main()
