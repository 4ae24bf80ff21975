"""Bytes that a rank sends for a loss and its gradient, counted below all code that is compared."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed.nn  # the peer imports it when first used: once here, not in every rank
import torch.nn.functional as F
from torch import Tensor

import engine.torchvision_ops  # noqa: F401
from engine.config import schema
from engine.dist import collectives
from engine.registry import find
from engine.types import Features
from tests.bench.timing import peak_bytes
from tests.distributed import run
from tests.traffic import counted

open_clip = pytest.importorskip("open_clip.loss")
ROWS, WIDTH = 64, 512  # of a rank, fp32


def _inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(collectives.rank())
    image, text = (
        F.normalize(torch.randn(ROWS, WIDTH, generator=generator), dim=1).requires_grad_()
        for _ in range(2)
    )
    return image, text, torch.tensor([2.0], requires_grad=True)


def _by_local_loss() -> Tensor:
    me, n = collectives.rank(), collectives.world()
    image, text, log_scale = _inputs()
    peer = open_clip.ClipLoss(local_loss=True, gather_with_grad=True, rank=me, world_size=n)
    return peer(image, text, log_scale.exp())


def _by_ours(name: str, gather: str, tile_size: int | None = None) -> Tensor:
    image, text, log_scale = _inputs()
    shared = {"logit_scale": log_scale, "logit_bias": torch.zeros(1, requires_grad=True)}
    loss = find("losses", name).build(schema.Loss(name=name, gather=gather, tile_size=tile_size))
    return loss(Features({"image_BD": image, "text_BD": text}, shared))["loss"]


def _sent() -> dict[str, float]:
    """Bytes that a rank sends, by each loss."""
    collectives.control_group()
    found = {}
    work: dict[str, Callable[[], Tensor]] = {"local loss": _by_local_loss}
    for name in ("NCE", "Sigmoid"):
        for gather in ("all", "ring"):
            work[f"{name} {gather}"] = lambda name=name, gather=gather: _by_ours(name, gather)
    for name, loss in work.items():
        with counted() as sent:
            loss().backward()
        found[name] = sum(sent)
    return found


@pytest.mark.parametrize("world", [2, 4])
def test_half_of_what_the_local_loss_form_sends(world: int) -> None:
    block = ROWS * WIDTH * 4
    for found in run(_sent, world):
        local = found["local loss"]
        assert local == 4 * (world - 1) * block  # both sides and both gradients
        for name in ("NCE all", "Sigmoid all"):
            assert found[name] <= 0.55 * local, name
        # A ring brings the texts (under NCE twice) and takes their gradient home
        for name, passes in (("NCE ring", 2), ("Sigmoid ring", 1)):
            sent = found[name]
            assert sent <= 1.05 * (passes * (world - 1) + world) * block, name


def _peak_blocks() -> dict[str, float]:
    """Peak memory beside the inputs, in blocks of one rank's features."""
    collectives.control_group()
    found = {}
    for name in ("NCE", "Sigmoid"):
        for gather in ("all", "ring"):
            options = {"name": name, "gather": gather, "tile_size": 4}
            peak = peak_bytes(lambda options=options: _by_ours(**options).backward())
            found[f"{name} {gather}"] = peak / (ROWS * WIDTH * 4)
    return found


def test_a_ring_holds_the_texts_of_two_other_ranks_and_no_more() -> None:
    three, four = (run(_peak_blocks, world)[0] for world in (3, 4))
    for name in ("NCE", "Sigmoid"):
        # The texts in work and those that arrive, their gradients, and the images' gradient; and
        # the two inputs, and what made them unit vectors
        assert four[f"{name} ring"] <= three[f"{name} ring"] + 0.1
        assert three[f"{name} ring"] + 3 < three[f"{name} all"]
        assert four[f"{name} all"] > three[f"{name} all"] + 1.9
