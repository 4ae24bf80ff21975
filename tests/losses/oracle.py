"""The losses written naively in one process over whole matrices, to hold the tiled ones against."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.config import schema
from engine.dist import collectives
from engine.registry import find
from engine.types import Features


def make_features(n: int, dim: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two sets of n unit vectors in fp64, of which equal rows are somewhat alike."""
    generator = torch.Generator().manual_seed(seed)
    image_GD = torch.randn(n, dim, dtype=torch.float64, generator=generator)
    noise_GD = torch.randn(n, dim, dtype=torch.float64, generator=generator)
    return F.normalize(image_GD, dim=1), F.normalize(image_GD + noise_GD, dim=1)


def make_partners(counts: Sequence[int], kind: str) -> list[Tensor]:
    """Each rank's partner rows: reversed, or a permutation that is not its own inverse."""
    if kind == "reversed":
        return [torch.arange(n).flip(0) for n in counts]
    return [torch.arange(n).roll(1) for n in counts]


def _softmax(
    S: Tensor, target: Tensor, partner: Tensor | None, lam: float, smoothing: float
) -> Tensor:
    """Σ over rows of the cross-entropy, by torch's own function."""

    def entropy(index: Tensor) -> Tensor:
        return F.cross_entropy(S, index, label_smoothing=smoothing, reduction="sum")

    return (
        entropy(target) if partner is None else lam * entropy(target) + (1 - lam) * entropy(partner)
    )


def _nce_group(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    partner: Tensor | None,
    lam: float,
    nce: schema.NceLoss,
) -> Tensor:
    """Σ over the group's rows of the two directions' mean cross-entropy."""
    target = torch.arange(len(image))
    gathered_text = text if nce.gather_backward else text.detach()
    gathered_image = image if nce.gather_backward else image.detach()
    to_text = _softmax(scale * image @ gathered_text.T, target, partner, lam, nce.smoothing)
    to_image = _softmax(scale * text @ gathered_image.T, target, partner, lam, nce.smoothing)
    return (to_text + to_image) / 2


def _sigmoid_group(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, partner: Tensor | None, lam: float
) -> Tensor:
    z = scale * image @ text.T + bias
    y = torch.eye(len(image), dtype=z.dtype)
    if partner is not None:
        rows = torch.arange(len(image))
        mixed = torch.zeros_like(y)
        mixed[rows, partner] += 0.5  # image i with text partner(i), and the other direction
        mixed[partner, rows] += 0.5
        y = lam * y + (1 - lam) * mixed
    return -(y * F.logsigmoid(z) + (1 - y) * F.logsigmoid(-z)).sum()


def whole_loss(
    config: schema.Loss,
    counts: Sequence[int],
    inputs: Sequence[Tensor],
    partners: Sequence[Tensor] | None,
    lam: float,
) -> Tensor:
    """The global batch's loss of all ranks' images and texts, log-scale and bias.

    ``partners``: each rank's rows' partners, as rows of that rank.
    """
    image, text, log_scale, bias = inputs
    sigmoid = "igmoid" in config.name
    group_size = (config.sigmoid_loss if sigmoid else config.nce_loss).group_size
    size = len(counts) if group_size == -1 else group_size
    total = torch.zeros((), dtype=torch.float64)
    start = 0
    for first in range(0, len(counts), size):
        members = counts[first : first + size]
        rows = slice(start, start + sum(members))
        partner = None
        if partners is not None:
            offsets = [sum(members[:k]) for k in range(len(members))]
            local = partners[first : first + size]
            partner = torch.cat([p + o for p, o in zip(local, offsets, strict=True)])
        pairs = image[rows], text[rows], log_scale.exp()
        if sigmoid:
            part = _sigmoid_group(*pairs, bias, partner, lam)
        else:
            part = _nce_group(*pairs, partner, lam, config.nce_loss)
        total = total + part / sum(counts)
        start = rows.stop
    return total


def oracle(
    config: schema.Loss, counts: Sequence[int], log_scale: float, lam: float, partners: str | None
) -> list[Tensor]:
    """Loss and its gradients for all ranks' images, texts, log-scale and bias."""
    image, text = (x.requires_grad_() for x in make_features(sum(counts)))
    shared = torch.tensor([log_scale], dtype=torch.float64, requires_grad=True)
    bias = torch.tensor([-2.0], dtype=torch.float64, requires_grad=True)
    local = make_partners(counts, partners) if partners else None
    inputs = (image, text, shared, bias)
    total = whole_loss(config, counts, inputs, local, lam)
    gradients = torch.autograd.grad(total, inputs, allow_unused=True)
    return [total.detach(), *(g for g in gradients if g is not None)]


def tiled(
    config: schema.Loss, counts: Sequence[int], log_scale: float, lam: float, partners: str | None
) -> list[Tensor]:
    """The same of this rank's rows, by the loss that the configuration names."""
    me = collectives.rank()
    image, text = (x.split(list(counts))[me].clone() for x in make_features(sum(counts)))
    image, text = image.requires_grad_(), text.requires_grad_()
    shared = torch.tensor([log_scale], dtype=torch.float64, requires_grad=True)
    bias = torch.tensor([-2.0], dtype=torch.float64, requires_grad=True)
    per_sample: dict[str, Tensor] = {"image_BD": image, "text_BD": text}
    info: dict[str, Any] = {}
    if partners:
        own = torch.arange(counts[me])
        per_sample["partner_offset_B"] = make_partners(counts, partners)[me] - own
        info["lam"] = lam
    features = Features(per_sample, {"logit_scale": shared, "logit_bias": bias}, info)
    loss = find("losses", config.name).build(config)(features)["loss"]
    gradients = torch.autograd.grad(loss, (image, text, shared, bias), allow_unused=True)
    return [loss.detach(), *(g for g in gradients if g is not None)]


def assert_exact(
    got: Tensor, want: Tensor, *, tolerance: float = 1e-10, floor: float = 1e-300
) -> None:
    error = (got - want).abs().max() / want.abs().max().clamp_min(floor)
    assert error <= tolerance, f"relative error {error:.2e}"
