"""What tasks rely on: parameters, bounds, mixing, gradients by differences, extremes, memory."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from engine.config import schema
from engine.errors import UserError
from engine.losses.contrast import Exchange, positives
from engine.losses.nce import SoftmaxContrast
from engine.losses.sigmoid import SigmoidContrast
from engine.losses.tiles import Tiles, _sum_log1p
from engine.registry import find
from engine.types import Features
from tests.bench.timing import peak_bytes
from tests.distributed import run
from tests.losses.oracle import make_features, tiled
from tests.traffic import counted


def _build(**options: object) -> Any:
    config = schema.Loss(**options)
    return find("losses", config.name).build(config)


@pytest.mark.parametrize("offset", [None, torch.tensor([4, 2, 0, -2, -4])])
@pytest.mark.parametrize("scale", [5.0, 800.0])
def test_gradients_by_differences(offset: torch.Tensor | None, scale: float) -> None:
    image, text = (x.requires_grad_() for x in make_features(5, 3))
    scales = torch.tensor(scale, dtype=torch.float64, requires_grad=True)
    bias = torch.tensor(-1.0, dtype=torch.float64, requires_grad=True)
    matches = positives(5, image.device, offset, 0.4)
    rest = matches, Exchange(5)

    def softmax(*inputs: torch.Tensor) -> torch.Tensor:
        return SoftmaxContrast.apply(*inputs, *rest, schema.NceLoss(smoothing=0.1), 2)

    def sigmoid(*inputs: torch.Tensor) -> torch.Tensor:
        return SigmoidContrast.apply(*inputs, *rest, 2)

    step = 1e-6 if scale < 100 else 1e-8
    assert torch.autograd.gradcheck(softmax, (image, text, scales), eps=step, atol=1e-4)
    assert torch.autograd.gradcheck(sigmoid, (image, text, scales, bias), eps=step, atol=1e-4)


def _at_the_lowest_temperature(gather: str) -> list[tuple[str, torch.Tensor]]:
    found = []
    for name in ("NCE", "MixUpNCE", "Sigmoid", "MixUpSigmoid"):
        for dtype in (torch.float32, torch.bfloat16):
            image = F.normalize(torch.randn(12, 8), dim=1)
            text = torch.cat([image[:6], -image[6:]])
            inputs = [x.to(dtype).requires_grad_() for x in (image, text)]
            shared = {"logit_scale": torch.tensor([math.log(1000.0)], requires_grad=True)}
            shared["logit_bias"] = torch.tensor([-10.0], requires_grad=True)
            per_sample = {"image_BD": inputs[0], "text_BD": inputs[1]}
            if "MixUp" in name:
                per_sample["partner_offset_B"] = torch.arange(12).flip(0) - torch.arange(12)
            features = Features(per_sample, shared, {"lam": 0.3})
            loss = _build(name=name, gather=gather)(features)["loss"]
            loss.backward()
            made = (loss.detach(), *(x.grad for x in (*inputs, shared["logit_scale"])))
            found += [(f"{name} {dtype}", x) for x in made]
    return found


@pytest.mark.parametrize(("world", "gather"), [(1, "all"), (2, "all"), (2, "ring")])
def test_finite_at_the_lowest_temperature(world: int, gather: str) -> None:
    """τ = 0.001, opposed and equal features: logits of ±1000."""
    for found in run(_at_the_lowest_temperature, world, gather):
        assert len(found) == 32
        for described, value in found:
            assert value.isfinite().all(), described


def test_the_two_ways_of_a_tile_agree() -> None:
    """Where exp is bounded one exponential serves both directions: same values as by maxima."""
    image, text = (x.float() for x in make_features(40, 16))
    options = {"matches": positives(40, image.device, None, 1.0), "rows": 16}
    free, careful = (Tiles(image, text, torch.tensor(30.0), **options) for _ in range(2))
    free.shape = careful.shape = 16, 24
    assert free._bounded
    careful._bounded = False
    assert not Tiles(image, text, torch.tensor(100.0), **options)._bounded
    row, column = (image @ text.T * 30).logsumexp(1), (image @ text.T * 30).logsumexp(0)
    for rows, columns in free:
        both = zip(free.log_sums((rows, columns)), careful.log_sums((rows, columns)), strict=True)
        for a, b in both:
            torch.testing.assert_close(a, b)
        sums = row[rows], column[columns], 0.01
        a = free.softmax_dlogits((rows, columns), *sums, mutual=True)[
            0
        ].clone()  # the tile's memory
        b, again = careful.softmax_dlogits((rows, columns), *sums, mutual=True)
        assert b is again
        torch.testing.assert_close(a, b)
        for tiles in (free, careful):
            both = tiles.softmax_dlogits((rows, columns), *sums, mutual=False)
            torch.testing.assert_close(sum(both), a)


def test_parameters_and_bounds() -> None:
    nce = _build(temperature={"value": 0.07})
    assert nce.parameters == {"logit_scale": (pytest.approx(math.log(1 / 0.07)), True)}
    assert nce.bounds == {"logit_scale": (None, pytest.approx(math.log(100)))}
    constant = _build(temperature={"name": "constant", "value": 0.001})
    assert constant.parameters["logit_scale"] == (pytest.approx(math.log(1000)), False)
    assert constant.bounds == {}
    sigmoid = _build(name="SigLIP", sigmoid_loss={"bias": -9.0, "scale": 8.0})
    assert sigmoid.parameters["logit_scale"] == (pytest.approx(math.log(8)), True)
    assert sigmoid.parameters["logit_bias"] == (-9.0, True)
    with pytest.raises(UserError, match=r"loss\.temperature\.min"):
        _build(temperature={"value": 0.001})


@pytest.mark.parametrize(("name", "options"), [("NCE", "nce_loss"), ("Sigmoid", "sigmoid_loss")])
def test_group_size_must_divide_the_world(name: str, options: str) -> None:
    message = f"loss.{options}.group_size 3 does not divide the 4 ranks"
    with pytest.raises(Exception, match=message):
        run(tiled, 4, schema.Loss(name=name, **{options: {"group_size": 3}}), [1] * 4, 2.0, 1, None)


@pytest.mark.parametrize("name", ["MixUpNCE", "MixUpSigmoid"])
def test_mixing_is_a_fair_coin_and_pure(name: str) -> None:
    loss = _build(name=name, mixup={"beta": 0.5, "partner": "random"})
    draws = [loss.mix(step, 7) for step in range(2000)]
    assert draws == [loss.mix(step, 7) for step in range(2000)]
    assert loss.mix(0, 8) != draws[0]
    assert all(d.image != d.text and d.partner == "random" for d in draws)
    assert 0.45 < sum(d.image for d in draws) / 2000 < 0.55
    lam = torch.tensor([d.lam for d in draws])
    assert abs(lam.mean() - 0.5) < 0.03
    assert abs(lam.var() - 1 / 8) < 0.015  # αβ/((α+β)²(α+β+1)) at ½, ½
    both = _build(name=name, mixup={"modality": "both"}).mix(3, 7)
    assert both.image
    assert both.text
    assert _build(name="NCE").mix(3, 7) is None
    assert _build(name="Sigmoid").mix(3, 7) is None


def _bytes_sent(gather: str) -> float:
    with counted() as sent:
        tiled(schema.Loss(gather=gather), [32, 32], 2.0, 1.0, None)
    return sum(sent)


def test_traffic_is_half_of_gathering_both_sides() -> None:
    """Both sides: gather images and texts, and scatter both gradients, each b·D to the other."""
    both_sides = 4 * 32 * 6 * 8
    columns = 4 * 64 * 8  # two all-reduces of a float a column, small at real widths (here 6)
    for sent in run(_bytes_sent, 2, "all"):
        assert sent - columns / 2 <= 0.5 * both_sides
        assert sent - columns / 2 >= 0.49 * both_sides
        wide = 4 * 32 * 512 * 8
        assert 0.5 * wide + columns / 2 <= 0.55 * wide
    for sent in run(_bytes_sent, 2, "ring"):  # texts once and again, their gradient home
        assert sent - columns / 2 <= both_sides


@pytest.mark.parametrize("name", ["NCE", "Sigmoid"])
def test_memory_grows_with_the_batch_not_its_square(name: str) -> None:
    def peak(n: int) -> int:
        image, text = (torch.randn(n, 32).requires_grad_() for _ in range(2))
        scale = torch.zeros(1, requires_grad=True)
        features = Features({"image_BD": F.normalize(image), "text_BD": F.normalize(text)})
        features.shared.update(logit_scale=scale, logit_bias=torch.zeros(1, requires_grad=True))
        loss = _build(name=name, tile_size=32)
        return peak_bytes(lambda: loss(features)["loss"].backward())

    small, large = peak(1024), peak(4096)
    assert math.log(large / small) / math.log(4) <= 1.2


def test_a_batch_of_nothing_on_one_rank() -> None:
    for loss, *gradients in run(tiled, 2, schema.Loss(), [0, 3], 2.0, 1.0, None):
        assert loss.isfinite()
        assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("highest", [-18.0, 0.0, 3.0, 39.0])
@pytest.mark.parametrize("rows", [1, 2, 7, 64])
def test_sum_of_logarithms(highest: float, rows: int) -> None:
    """Folded, and with the digits of terms far below fp32's distance of 1 to its neighbour."""
    z = highest - 12 * torch.rand(rows, 33)
    got = _sum_log1p(z.exp(), highest, torch.empty_like(z))
    torch.testing.assert_close(got.double(), F.softplus(z.double()).sum(), rtol=2e-6, atol=0.0)
