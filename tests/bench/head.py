"""The head and loss of captions at 23 % supervised positions: ours beside two others.

    python -m tests.bench head [--threads N]

From a decoder's states [B, T, D] and its table of tokens [V, D] to the loss and both gradients.
Captions have the lengths of the ``text`` row in 77 columns; what is padding has no label.
open_clip computes all logits and hands them to ``CoCaLoss`` (its caption part alone); torch's fused
function takes all positions in one call with ``ignore_index``. The limit is that function on states
that are picked already. Sizes of open_clip's coca_ViT-B-32: D 512, V 49,408.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

import engine.torchvision_ops  # noqa: F401  before open_clip, which imports torchvision

from open_clip.loss import CoCaLoss  # isort: skip
from engine.losses.language_model import IGNORED, row_losses
from tests.bench.table import Line, Options
from tests.bench.text import LONGEST, make_batch
from tests.bench.timing import in_turns, peak_bytes, ratio

Result = tuple[Tensor, tuple[Tensor, ...]]  # loss, gradients of states and table
PAD = 0  # open_clip's label of a position that does not count


def make_inputs(rows: int, vocabulary: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    """States [B, T, D], labels [B, T], table [V, D]."""
    mask_BT = make_batch(rows, 8)["attention_mask_BT"]
    mask_BT = F.pad(mask_BT, (0, LONGEST - mask_BT.shape[1])).bool()
    generator = torch.Generator().manual_seed(0)
    label_BT = torch.randint(1, vocabulary, mask_BT.shape, generator=generator)
    hidden_BTD = torch.randn(*mask_BT.shape, width, generator=generator).to(dtype)
    weight_VD = torch.randn(vocabulary, width, generator=generator).to(dtype) / width**0.5
    label_BT = label_BT.masked_fill(~mask_BT, IGNORED)
    return [hidden_BTD.requires_grad_(), label_BT, weight_VD.requires_grad_()]


def candidates(
    hidden_BTD: Tensor, label_BT: Tensor, weight_VD: Tensor
) -> dict[str, Callable[[], Result]]:
    """Each from inputs to the mean loss of supervised positions and its gradients."""
    at_BT = label_BT != IGNORED
    coca, padded_BT = CoCaLoss(1.0, 0.0, pad_id=PAD), label_BT.masked_fill(~at_BT, PAD)
    picked_SD = hidden_BTD.detach()[at_BT].requires_grad_()

    def ours() -> Tensor:
        return row_losses(hidden_BTD, label_BT, weight_VD).sum() / at_BT.sum()

    def open_clip() -> Tensor:
        logits_BTV = hidden_BTD @ weight_VD.T
        return coca(None, None, logits_BTV, padded_BT, None)[1]

    def fused() -> Tensor:
        hidden_RD, label_R = hidden_BTD.flatten(0, 1), label_BT.flatten()
        return F.linear_cross_entropy(hidden_RD, weight_VD, label_R, ignore_index=IGNORED)

    def limit() -> Tensor:
        return F.linear_cross_entropy(picked_SD, weight_VD, label_BT[at_BT])

    def with_gradients(loss: Callable[[], Tensor], states: Tensor) -> Callable[[], Result]:
        def work() -> Result:
            value = loss()
            return value.detach(), torch.autograd.grad(value, (states, weight_VD))

        return work

    return {
        "ours": with_gradients(ours, hidden_BTD),
        "open_clip": with_gradients(open_clip, hidden_BTD),
        "fused": with_gradients(fused, hidden_BTD),
        "limit": with_gradients(limit, picked_SD),
    }


def largest_difference(work: dict[str, Callable[[], Result]]) -> float:
    """Of any gradient of ours from the others', as a share of its largest entry."""
    (loss, mine), found = work["ours"](), 0.0
    for name in ("open_clip", "fused"):
        value, gradients = work[name]()
        torch.testing.assert_close(loss, value, rtol=1e-5, atol=0.0)
        for got, want in zip(mine, gradients, strict=True):
            found = max(found, float((got - want).abs().max() / want.abs().max()))
    return found


def rows(options: Options) -> Iterator[Line]:
    """Gradients, time and memory."""
    exact = largest_difference(candidates(*make_inputs(4, 500, 32, torch.float64)))
    assert exact <= 1e-10, exact
    inputs = make_inputs(*((4, 500, 32) if options.quick else (16, 49_408, 512)), torch.float32)
    supervised = float((inputs[1] != IGNORED).float().mean())
    assert options.quick or 0.2 < supervised < 0.26, supervised
    work = candidates(*inputs)
    difference = largest_difference(work)
    assert difference <= 1e-6, difference
    yield Line("gradients, largest difference", difference, limit=exact, ratio=difference,
               mark="≤ 1e-6")  # fmt: skip
    seconds = in_turns(work, 1 if options.quick else options.repeats)
    ms = {name: 1e3 * statistics.median(found) for name, found in seconds.items()}
    share = f"{supervised:.0%} of positions"
    for name, what, mark in (
        ("open_clip", "CoCaLoss", "≥ 5"),
        ("fused", "linear_cross_entropy over all", "≥ 1.0"),
        ("limit", "linear_cross_entropy on picked states", ""),
    ):
        yield Line(f"{share}, {what} ÷ ours", ms["ours"], ms[name], ms["limit"], mark=mark,
                   unit="ms", **ratio(seconds[name], seconds["ours"]))  # fmt: skip
    mib = {name: peak_bytes(run) / 2**20 for name, run in work.items()}
    yield Line(f"{share}, memory, CoCaLoss ÷ ours", mib["ours"], mib["open_clip"], mib["limit"],
               mib["open_clip"] / mib["ours"], unit="MiB")  # fmt: skip
