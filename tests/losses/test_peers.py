"""The losses against open_clip's, and in low precision against the fp64 truth."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import engine.torchvision_ops  # noqa: F401
from engine.config import schema
from engine.dist import collectives
from engine.registry import find
from engine.types import Features
from tests.distributed import run
from tests.losses.oracle import assert_exact, make_features

open_clip = pytest.importorskip("open_clip.loss")
NAMES = ("NCE", "Sigmoid")


def _ours(name: str, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    shared = {"logit_scale": scale.log()[None], "logit_bias": bias[None]}
    features = Features({"image_BD": image, "text_BD": text}, shared)
    return find("losses", name).build(schema.Loss(name=name))(features)["loss"]


def _inputs(n: int, scale: float = 20.0) -> list[Tensor]:
    image, text = make_features(n)
    shared = [torch.tensor(x, dtype=torch.float64) for x in (scale, -3.0)]
    return [x.requires_grad_() for x in (image, text, *shared)]


def _value_and_gradient(loss: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    gradients = torch.autograd.grad(loss, inputs, allow_unused=True)
    return [loss.detach(), *(g for g in gradients if g is not None)]


@pytest.mark.parametrize("name", NAMES)
def test_equals_open_clip_in_one_process(name: str) -> None:
    inputs = _inputs(9)
    got = _value_and_gradient(_ours(name, *inputs), inputs)
    if name == "NCE":
        peer = open_clip.ClipLoss()(*inputs[:3])
    else:
        peer = open_clip.SigLipLoss()(*inputs)
    for mine, theirs in zip(got, _value_and_gradient(peer, inputs), strict=True):
        assert_exact(mine, theirs)


def _both(name: str, options: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    me, n = collectives.rank(), collectives.world()
    inputs = _inputs(4 * n)
    inputs[:2] = [x.detach().chunk(n)[me].clone().requires_grad_() for x in inputs[:2]]
    kind = open_clip.ClipLoss if name == "NCE" else open_clip.SigLipLoss
    peer = kind(rank=me, world_size=n, **options)(*(inputs[:3] if name == "NCE" else inputs))
    ours = _ours(name, *inputs)
    return _value_and_gradient(ours, inputs), _value_and_gradient(peer, inputs)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("NCE", {"gather_with_grad": True, "local_loss": True}),
        ("NCE", {"gather_with_grad": True, "local_loss": False}),
        ("Sigmoid", {}),
    ],
)
def test_equals_open_clip_on_two_ranks(name: str, options: dict[str, Any]) -> None:
    """Losses and shared gradients as means over ranks; each rank's feature gradients alone."""
    ranks = run(_both, 2, name, options)
    for position in range(len(ranks[0][0])):
        mine, theirs = (torch.stack([rank[k][position] for rank in ranks]) for k in (0, 1))
        if position not in (1, 2):
            mine, theirs = mine.mean(0), theirs.mean(0)
        assert_exact(mine, theirs)


@pytest.mark.parametrize("scale", [14.0, 100.0])
def test_bf16_gradient_is_far_truer_than_autocast(scale: float) -> None:
    """From equal bf16 features, at the start of training and near its end."""
    generator = torch.Generator().manual_seed(1)
    image = F.normalize(torch.randn(256, 64, generator=generator), dim=1)
    noise = torch.randn(256, 64, generator=generator) / 5
    text = F.normalize(image + noise, dim=1)
    image, text = image.bfloat16(), text.bfloat16()
    truth = [x.double().requires_grad_() for x in (image, text, torch.tensor(scale))]
    want = torch.autograd.grad(open_clip.ClipLoss()(*truth), truth[:2])
    peer = [x.float().requires_grad_() for x in (image, text, torch.tensor(scale))]
    with torch.autocast("cpu", torch.bfloat16):
        theirs = torch.autograd.grad(open_clip.ClipLoss()(*peer), peer[:2])
        # fp32 features of the same values, so that the gradient is not rounded to bf16 itself
        ours = torch.autograd.grad(_ours("NCE", *peer, torch.tensor(0.0)), peer[:2])
    for mine, other, true in zip(ours, theirs, want, strict=True):
        assert 5 * (mine - true).norm() < (other - true).norm()
    low = [x.clone().requires_grad_() for x in (image, text)]
    loss = _ours("NCE", *low, torch.tensor(scale), torch.tensor(0.0))
    assert loss.dtype == torch.float32
    for mine, other, true in zip(
        torch.autograd.grad(loss, low), theirs, want, strict=True
    ):  # rounded to bf16 only as the features' own gradient
        assert mine.dtype == torch.bfloat16
        assert (mine - true).norm() < 0.002 * true.norm()
        assert (mine - true).norm() < (other - true).norm()
