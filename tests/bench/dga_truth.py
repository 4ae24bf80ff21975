"""Gradients of three accumulation steps, divided by the truth, on 1, 2 and 4 ranks.

    python -m tests.bench.dga_truth [--loss NCE|Sigmoid] [--world 1 2 4] [--k 1 2 4 8]

fp64, dropout 0.1, half of the patches dropped. The truth is the undivided loss of all ranks' rows
in one process, with the same random numbers as the pass that each step takes gradients in. Printed
for weights, scale and bias: the gradient's component along the truth (1 is right) and its relative
error.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch._dynamo  # DDP imports it, for seconds: once here, not in every forked rank
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from engine.config import schema
from engine.dist import collectives
from engine.train import rng
from engine.train.precision import Precision
from engine.train.steps import dga
from tests.bench import accumulation as peers
from tests.distributed import run
from tests.train.tiny import replicas

CPU = torch.device("cpu")
ROWS, IMAGE_SIZE, DROPOUT, PATCH_DROP = 8, 32, 0.1, 0.5  # rows of a rank
Random = Callable[[int], AbstractContextManager[None]]
Gradients = dict[str, Tensor]


def _random(rank: int, salt: int = 0) -> Random:
    return lambda j: rng.isolated(rng.derive(salt, 0, rank, j), CPU)


def _model(loss: str) -> Any:
    return peers.make_model(
        loss, image_size=IMAGE_SIZE, dropout=DROPOUT, patch_drop=PATCH_DROP, small=True
    )


def _gradients(model: Any) -> Gradients:
    module = model.module if isinstance(model, DistributedDataParallel) else model
    return {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


def whole_loss(name: str) -> peers.Loss:
    """The loss over whole matrices, in one process."""

    def contrast(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        logits = scale * image @ text.T
        if name == "NCE":
            target = torch.arange(len(image))
            return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        signs = 2 * torch.eye(len(image), dtype=logits.dtype) - 1
        return -F.logsigmoid(signs * (logits + bias)).sum() / len(image)

    return contrast


def truth(name: str, world: int, k: int) -> Gradients:
    """Undivided: one graph over all rows of all ranks."""
    model, done = _model(name), []
    for rank in range(world):
        for j, part in enumerate(peers.split(_batch(rank), k)):
            with _random(rank)(j):
                done.append(model(part))
    image, text = (torch.cat([o[n] for o in done]) for n in ("image_BD", "text_BD"))
    bias = getattr(model, "logit_bias", None)
    whole_loss(name)(image, text, model.logit_scale.exp(), bias).backward()
    return _gradients(model)


def _batch(rank: int) -> dict[str, Any]:
    return peers.make_batch(ROWS, IMAGE_SIZE, first=rank * ROWS)


def by_ours(name: str, k: int) -> Gradients:
    model = replicas(_model(name))
    world = collectives.world()
    step = dga.build(
        schema.Runner(keep_graphs=1),
        schema.Data(batch_size_train=world * ROWS // k),
        task=peers.PairTask(name),
        model=model,
        precision=Precision("fp32", CPU),
        device=CPU,
    )
    step(_batch(collectives.rank()), 0)
    return _gradients(model.module)


def by_gradcache(name: str, k: int) -> Gradients:
    """With its loss for several ranks: own rows live, the others' gathered, times the world.

    The scalars lie beside the wrapped encoders, whose forward does not return them.
    """
    module = _model(name)
    for scalar in (module.logit_scale, getattr(module, "logit_bias", None)):
        if scalar is not None:
            scalar.requires_grad_(False)
    model = replicas(module).wrapped
    for scalar in (module.logit_scale, getattr(module, "logit_bias", None)):
        if scalar is not None:
            scalar.requires_grad_(True)

    def gathered(x: Tensor) -> Tensor:
        world = collectives.world()
        parts = list(collectives.all_gather_rows(x, [len(x)] * world).chunk(world))
        parts[collectives.rank()] = x
        return torch.cat(parts)

    def contrast(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        loss = whole_loss(name)(gathered(image), gathered(text), scale, bias)
        return loss * collectives.world()

    rank = collectives.rank()
    peers.gradcache(model, module, contrast, peers.split(_batch(rank), k), _random(rank))
    return _gradients(model)


def by_open_clip(name: str, k: int) -> Gradients:
    """With its own losses, gathered with gradient; dropout is drawn anew in the second pass."""
    from open_clip.loss import ClipLoss, SigLipLoss

    rank, world = collectives.rank(), collectives.world()
    model = replicas(_model(name)).wrapped
    if name == "NCE":
        clip = ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=world)

        def contrast(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
            return clip(image, text, scale)

    else:
        contrast = SigLipLoss(rank=rank, world_size=world, dist_impl="bidir")
    parts = peers.split(_batch(rank), k)
    peers.open_clip(model, contrast, parts, _random(rank, salt=1), _random(rank))
    return _gradients(model)


STEPS = {"ours": by_ours, "gradcache": by_gradcache, "open_clip": by_open_clip}
GROUPS = {"scale": "logit_scale", "bias": "logit_bias"}


def compare(step: str, name: str, world: int, k: int) -> dict[str, tuple[float, float]]:
    """(component along the truth, relative error) of weights, scale and bias."""
    run_step, want = STEPS[step], truth(name, world, k)
    got = run(run_step, world, name, k)[0] if world > 1 else run_step(name, k)
    found = {}
    for group in ("weights", "scale", "bias"):
        names = [n for n in want if n == GROUPS.get(group)]
        if group == "weights":
            names = [n for n in want if n not in GROUPS.values()]
        if names:
            g, t = (torch.cat([x[n].flatten() for n in names]) for x in (got, want))
            found[group] = (float(g @ t / (t @ t)), float((g - t).norm() / t.norm()))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--loss", choices=("NCE", "Sigmoid"), nargs="+", default=["NCE", "Sigmoid"])
    parser.add_argument("--world", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--k", type=int, nargs="+", default=[1, 2, 4, 8])
    options = parser.parse_args()
    torch.set_num_threads(1)  # ranks are forked, which OpenMP's threads would not survive
    for name in options.loss:
        for world in options.world:
            for k in options.k:
                for step in STEPS:
                    cells = (
                        f"{group} {along:8.4f} (error {error:.0e})"
                        for group, (along, error) in compare(step, name, world, k).items()
                    )
                    print(f"{name:8} ranks {world} k {k} {step:10}", *cells, sep="  ", flush=True)


if __name__ == "__main__":
    main()
