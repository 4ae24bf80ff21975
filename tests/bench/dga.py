"""Our accumulation step beside its limit, GradCache's and open_clip's: time and peak memory.

    python -m tests.bench.dga [--rows N] [--image-size N] [--k 4 8 16] [--repeats N] [--threads N]

The limit is measured in the same rounds: forward without graph of the sub-batches whose graphs are
not kept, and forward and backward of all, with no loss. Every row first asserts that the gradients
of all three equal those of the undivided batch (open_clip's scale: k times as large).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from engine.config import schema
from engine.train.precision import Precision
from engine.train.steps import dga, plain
from engine.types import Batch
from tests.bench import accumulation as peers
from tests.bench.table import machine
from tests.bench.timing import peak_bytes, summaries
from tests.train.tiny import replicas

CPU = torch.device("cpu")


def ours(model: Any, batch: Batch, k: int | None, keep: Any) -> Callable[[], None]:
    """The engine's step in k sub-batches; undivided for None."""
    rows = len(batch["image_BCHW"])
    module, runner = (plain if k is None else dga), schema.Runner(keep_graphs=keep)
    step = module.build(
        runner,
        schema.Data(batch_size_train=rows // (k or 1)),
        task=peers.PairTask("NCE"),
        model=replicas(model),
        precision=Precision("fp32", CPU),
        device=CPU,
    )
    return lambda: step(batch, 0) and model.zero_grad(set_to_none=True)


def limit(model: Any, batch: Batch, k: int, keep: int) -> Callable[[], None]:
    """Passes that no step can do without that keeps so many graphs."""
    parts = peers.split(batch, k)
    gradient = torch.randn(len(batch["image_BCHW"]) // k, 512)

    def work() -> None:
        with torch.no_grad():
            for part in parts[: k - keep]:
                model(part)
        for part in parts:
            outputs = model(part)
            ends = [outputs["image_BD"], outputs["text_BD"]]
            torch.autograd.backward(ends, [gradient, gradient])
        model.zero_grad(set_to_none=True)

    return work


def theirs(name: str, model: Any, batch: Batch, k: int) -> Callable[[], None]:
    """A peer's step with open_clip's loss."""
    from open_clip.loss import ClipLoss

    parts, loss = peers.split(batch, k), ClipLoss()

    def random(j: int) -> Any:
        return nullcontext()  # no dropout here: neither replays anything

    def contrast(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        return loss(image, text, scale)

    def work() -> None:
        if name == "gradcache":
            peers.gradcache(model, model, contrast, parts, random)
        else:
            peers.open_clip(model, contrast, parts, random, random)
        model.zero_grad(set_to_none=True)

    return work


def assert_equal(model: Any, work: dict[str, Callable[[], None]], whole: Any, k: int) -> None:
    """Every gradient to 1e-4 of its norm (fp32)."""
    found: dict[str, dict[str, Tensor]] = {}
    clear = model.zero_grad
    for name, run in {"whole": whole, **work}.items():
        model.zero_grad = lambda set_to_none: None  # look before they are cleared
        run()
        found[name] = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad = clear
        model.zero_grad()
    for name, gradients in found.items():
        for parameter, want in found["whole"].items():
            factor = k if (name, parameter) == ("open_clip", "logit_scale") else 1
            error = (gradients[parameter] - factor * want).norm()
            assert error <= 1e-4 * factor * want.norm() + 1e-6, (name, parameter, float(error))


def compare(k: int, rows: int, image_size: int, repeats: int) -> dict[str, Any]:
    """Seconds of each, their spread, and peak MiB beside the weights and the batch."""
    model = peers.make_model("NCE", image_size=image_size)
    batch = peers.make_batch(rows, image_size)
    steps = {
        "ours keep 1": ours(model, batch, k, 1),
        "ours keep all": ours(model, batch, k, k),
        "ours auto": ours(model, batch, k, "auto"),
        "gradcache": theirs("gradcache", model, batch, k),
        "open_clip": theirs("open_clip", model, batch, k),
    }
    assert_equal(model, steps, ours(model, batch, None, 1), k)
    limits = {
        "limit keep 1": limit(model, batch, k, 1),
        "limit keep all": limit(model, batch, k, k),
    }
    found = summaries({**limits, **steps}, repeats)
    return {
        "k": k,
        "seconds": {name: timing.seconds for name, timing in found.items()},
        "spread": {name: timing.spread for name, timing in found.items()},
    }


def memory(k: int, sub_batch: int, image_size: int) -> dict[str, float]:
    """Peak MiB beside weights and batch of accumulation, and of what no such step goes below.

    ``plain`` is one sub-batch's undivided step, and the features of all rows.
    """
    model = peers.make_model("NCE", image_size=image_size)
    rows = k * sub_batch
    batch = peers.make_batch(rows, image_size)
    work = {
        "plain": ours(model, peers.split(batch, k)[0], None, 1),
        "ours keep 1": ours(model, batch, k, 1),
        "gradcache": theirs("gradcache", model, batch, k),
    }
    mib = {name: peak_bytes(run) / 2**20 for name, run in work.items()}
    mib["plain"] += 2 * rows * model.image_projection.out_features * 4 / 2**20
    return mib


def show(row: dict[str, Any]) -> None:
    seconds = row["seconds"]
    print(f"k {row['k']}")
    for name in seconds:
        bound = seconds["limit keep 1" if name.endswith("1") else "limit keep all"]
        print(
            f"  {name:14} {seconds[name]:7.3f} s ± {row['spread'][name]:.0%}   "
            f"limit × {seconds[name] / bound:.3f}   "
            f"gradcache × {seconds[name] / seconds['gradcache']:.3f}   "
            f"open_clip × {seconds[name] / seconds['open_clip']:.3f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--k", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(machine(options.threads))
    print(f"fp32, {options.rows} rows of {options.image_size} px")
    for k in options.k:
        show(compare(k, options.rows, options.image_size, options.repeats))


if __name__ == "__main__":
    main()
