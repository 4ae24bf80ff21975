"""The CUDA kernels against the eager tiles, on a GPU or by Triton's interpreter.

On a machine without a GPU, run with TRITON_INTERPRET=1 and triton installed.
"""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F

from engine.losses.contrast import positives
from engine.losses.tiles import Tiles

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32  # the interpreter has no bf16 dot
if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("no GPU, and TRITON_INTERPRET is not 1", allow_module_level=True)

from engine.losses.fused import FusedTiles  # noqa: E402


def _pair(bias: float | None, offset: torch.Tensor | None, scale: float) -> tuple[Tiles, Tiles]:
    generator = torch.Generator().manual_seed(0)
    image = F.normalize(torch.randn(150, 80, generator=generator), dim=1)
    text = torch.cat([torch.randn(50, 80, generator=generator) / 9, image[:140]])
    image, text = image.to(DEVICE, DTYPE), text.to(DEVICE, DTYPE)
    matches = positives(150, image.device, offset, 0.3)
    shared = [None if x is None else torch.tensor(x, device=DEVICE) for x in (scale, bias)]
    options = {"matches": matches, "own": 50, "rows": 130, "columns": 135}
    return FusedTiles(image, text, *shared, **options), Tiles(image, text, *shared, **options)


@pytest.mark.parametrize("scale", [20.0, 1000.0])
@pytest.mark.parametrize("mixed", [False, True])
def test_softmax_tiles(scale: float, mixed: bool) -> None:
    offset = 149 - 2 * torch.arange(150, device=DEVICE) if mixed else None
    fused, eager = _pair(None, offset, scale)
    assert list(fused) == list(eager)
    logits = scale * eager.image_BD @ eager.text_KD.T
    row, column = logits.logsumexp(1), logits.logsumexp(0)
    for rows, columns in fused:
        sums = fused.log_sums((rows, columns)), eager.log_sums((rows, columns))
        for got, want in zip(*sums, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)
        args = (rows, columns), row[rows], column[columns], 0.001
        for mutual in (True, False):
            pairs = (tiles.softmax_dlogits(*args, mutual=mutual) for tiles in (fused, eager))
            for got, want in zip(*pairs, strict=True):
                torch.testing.assert_close(got.float(), want, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("mixed", [False, True])
def test_sigmoid_tiles_and_products(mixed: bool) -> None:
    offset = 149 - 2 * torch.arange(150, device=DEVICE) if mixed else None
    fused, eager = _pair(-5.0, offset, 20.0)
    gradients = [[torch.zeros(n, 80, device=DEVICE) for n in (150, 190)] for _ in range(2)]
    for rows, columns in fused:
        results = [tiles.sigmoid_dlogits((rows, columns)) for tiles in (fused, eager)]
        for got, want in zip(results[0][:2], results[1][:2], strict=True):
            torch.testing.assert_close(got.double(), want.double(), rtol=1e-4, atol=1e-3)
        for tiles, (_, _, dlogits), places in zip((fused, eager), results, gradients, strict=True):
            tiles.add_products((rows, columns), (dlogits, dlogits), *places)
    for got, want in zip(*gradients, strict=True):
        assert (got - want).norm() < 0.005 * want.norm()
