"""What a training step will cost: an estimate of its memory, and a count of its arithmetic."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from engine.types import Batch


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on one device. An estimate: allocator slack and kernels' scratch come on top."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    loss: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.loss


def estimate_memory(
    model: nn.Module,
    batch: Batch,
    rows: int,
    *,
    dtype: torch.dtype = torch.float32,
    states: int = 2,
    keep_graphs: int = 1,
    global_rows: int | None = None,
    dim: int = 512,
    tile: int = 1024,
) -> Memory:
    """Memory of a training step of ``rows`` samples a device, in bytes.

    Args:
        model: on the CPU, with fp32 weights; run twice, on two and three samples.
        batch: at least three samples of the sizes that training will have.
        rows: samples whose graph is held at a time (a sub-batch under accumulation).
        dtype: of autocast; fp32 is none.
        states: tensors an optimizer keeps for each trained one (AdamW 2, SGD with momentum 1).
        keep_graphs: sub-batches whose graphs are held at once.
        global_rows, dim, tile: the loss holds both towers' features of all ranks and their
            gradients, of width ``dim``, and two similarity tiles of ``tile`` rows, in fp32.
    """
    trained = sum(_bytes(p) for p in model.parameters() if p.requires_grad)
    weights = sum(_bytes(p) for p in model.parameters()) + sum(_bytes(b) for b in model.buffers())
    # two and three: batch norm refuses a lone sample
    two, three = (saved_bytes(model, _first(batch, count), dtype) for count in (2, 3))
    sample = max(0, three - two)
    fixed = max(0, two - 2 * sample)  # weights cast by autocast, position ids and their like
    everywhere = global_rows if global_rows is not None else rows
    return Memory(
        weights=weights,
        gradients=trained,
        optimizer=states * trained,
        activations=keep_graphs * (fixed + sample * rows),
        loss=4 * (4 * everywhere * dim + 2 * min(tile, everywhere) ** 2),
    )


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
    half = (
        torch.autocast(device.type, dtype) if dtype != torch.float32 else contextlib.nullcontext()
    )
    with _undisturbed(model), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), half:
        outputs = model(batch)
    total = sum(tensor.untyped_storage().nbytes() for tensor in seen.values())
    del outputs
    return total


def count_flops(model: nn.Module, batch: Batch, *, backward: bool = True) -> int:
    """Floating-point operations (a multiply-add is two) of forward and backward of ``batch``.

    Counts matrix products and convolutions, whatever runs again under checkpointing included; the
    loss's similarity matrix is not part of it. Gradients are left as they were.
    """
    held = [(p, p.grad) for p in model.parameters()]
    for parameter, _ in held:
        parameter.grad = None
    counter = FlopCounterMode(display=False)
    # only the plain form of attention is made of products that the counter knows on every device
    with _undisturbed(model), sdpa_kernel(SDPBackend.MATH), counter:
        outputs = _features(model(batch))
        if backward and outputs.requires_grad:
            outputs.backward()
    for parameter, gradient in held:
        parameter.grad = gradient
    return int(counter.get_total_flops())


def _features(outputs: Mapping[str, Tensor]) -> Tensor:
    return torch.stack(
        [out.sum() for name, out in outputs.items() if name.endswith(("_BD", "nll_B"))]
    ).sum()


@contextlib.contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Train mode inside; the mode, the random state and batch statistics as before outside."""
    modes = {name: module.training for name, module in model.named_modules()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        with torch.random.fork_rng():
            model.train()
            yield
    finally:
        for name, module in model.named_modules():
            module.training = modes[name]
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


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
