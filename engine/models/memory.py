"""What a training step will cost: an estimate of its memory, and a count of its arithmetic."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from engine.models.towers import modes_restored
from engine.types import Batch


def estimate_memory(
    model: nn.Module,
    batch: Batch,
    rows: int,
    *,
    dtype: torch.dtype = torch.float32,
    global_rows: int | None = None,
    dim: int = 512,
    tile: int = 1024,
) -> dict[str, int]:
    """Bytes of a training step of ``rows`` samples on one device: weights, gradients, optimizer,
    activations and loss. Allocator slack and kernels' scratch come on top.

    Args:
        model: on the CPU, with fp32 weights; run twice, on two and three samples.
        batch: at least three samples of the sizes that training will have.
        rows: samples whose graph is held at a time (a sub-batch under accumulation).
        dtype: of autocast; fp32 is none.
        global_rows, dim, tile: the loss holds both towers' features of all ranks and their
            gradients, of width ``dim``, and two similarity tiles of ``tile`` rows, in fp32.
    """
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    # two and three: batch norm refuses a lone sample
    two, three = (saved_bytes(model, _first(batch, count), dtype) for count in (2, 3))
    sample = max(0, three - two)
    fixed = max(0, two - 2 * sample)  # weights cast by autocast, position ids and their like
    everywhere = global_rows if global_rows is not None else rows
    return {
        "weights": sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())),
        "gradients": trained,
        "optimizer": 2 * trained,  # as AdamW
        "activations": fixed + sample * rows,
        "loss": 4 * (4 * everywhere * dim + 2 * min(tile, everywhere) ** 2),
    }


def saved_bytes(model: nn.Module, batch: Batch, dtype: torch.dtype = torch.float32) -> int:
    """Bytes that the graph of one forward keeps for backward, beside parameters and buffers.

    What checkpointing drops is not counted, nor is its peak while it computes a block again.
    """
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    seen: dict[int, Tensor] = {}  # holds the tensors, so that no address is used twice

    def keep(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in own:
            seen.setdefault(address, tensor)
        return tensor

    device = next(iter(batch.values())).device
    half = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    with _undisturbed(model), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), half:
        model(batch)
    return sum(tensor.untyped_storage().nbytes() for tensor in seen.values())


def count_flops(model: nn.Module, batch: Batch) -> int:
    """Floating-point operations (a multiply-add is two) of forward and backward of ``batch``.

    Counts matrix products and convolutions, whatever runs again under checkpointing included; the
    loss's similarity matrix is not part of it. Gradients are left as they were.
    """
    held = [(parameter, parameter.grad) for parameter in model.parameters()]
    for parameter, _ in held:
        parameter.grad = None
    # only the plain form of attention is made of products that the counter knows on every device
    with _undisturbed(model), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as count:
        outputs = model(batch)
        sums = [out.sum() for name, out in outputs.items() if name.endswith(("_BD", "nll_B"))]
        total = torch.stack(sums).sum()
        if total.requires_grad:
            total.backward()
    for parameter, gradient in held:
        parameter.grad = gradient
    return int(count.get_total_flops())


@contextlib.contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Train mode inside; the mode, the random state and batch statistics as before outside."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with modes_restored(model), torch.random.fork_rng():
        model.train()
        try:
            yield
        finally:
            with torch.no_grad():
                for name, buffer in model.named_buffers():
                    buffer.copy_(buffers[name])


def _first(batch: Batch, count: int) -> Batch:
    rows = {key: value for key, value in batch.items() if isinstance(value, Tensor)}
    short = {key: len(value) for key, value in rows.items() if len(value) < count}
    if short:
        raise ValueError(f"an estimate needs {count} samples, the batch has {short}")
    # copies: a view would count the whole batch's storage
    return {key: value[:count].clone() for key, value in rows.items()}
