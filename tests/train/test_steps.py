"""The plain step, sub-batches, kept graphs, mixed precision and mixup under accumulation."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from engine.config import schema
from engine.dist import collectives, ddp
from engine.errors import UserError
from engine.losses import nce
from engine.models.dual_encoder import DualEncoder
from engine.registry import find
from engine.train import rng
from engine.train.precision import Precision
from engine.train.steps import batches, dga, plain
from engine.types import Features
from tests.distributed import run
from tests.train import tiny


def test_steps_by_their_published_names() -> None:
    assert find("train/steps", "clip_bs") is find("train/steps", "plain") is plain
    assert find("train/steps", "clip_bsgs") is find("train/steps", "dga") is dga
    assert find("dist", "torch") is ddp
    with pytest.raises(UserError, match="dga"):
        find("train/steps", "dg")


def _plain(counts: list[int]) -> tuple[Any, Any]:
    model = tiny.replicas(tiny.make_model())
    step = tiny.make_step(tiny.TinyTask(), model, None)
    # trimmed to the rank's longest text, as the oracle does: dropout depends on the shape
    batch = batches.take(tiny.make_batch(counts, collectives.rank()), slice(None))
    return step(batch, tiny.STEP), tiny.gradients(model)


@pytest.mark.parametrize("counts", [[9], [4, 6], [3, 2, 4, 3]])
def test_plain_step_is_the_global_batch(counts: list[int]) -> None:
    results = run(_plain, len(counts), counts) if len(counts) > 1 else [_plain(counts)]
    loss, want = tiny.oracle(tiny.make_model(), counts, max(counts))
    assert abs(sum(losses["loss"] for losses, _ in results) / len(counts) - loss) < 1e-12
    assert all(tiny.largest_error(got, want) < 1e-12 for _, got in results)
    assert results[0][0]["lam"] == 1.0


def test_plain_step_leaves_the_random_state() -> None:
    step = tiny.make_step(tiny.TinyTask(), tiny.make_model(), None)
    state = torch.get_rng_state()
    first = step(tiny.make_batch([5], 0), 1)
    assert torch.equal(torch.get_rng_state(), state)
    assert step(tiny.make_batch([5], 0), 1) == first


@pytest.mark.parametrize("sort", [True, False])
@pytest.mark.parametrize("parts", [1, 3, 4])
def test_split_covers_each_row_once(sort: bool, parts: int) -> None:
    batch = tiny.make_batch([10], 0)
    split = batches.Split(batch, parts, by_length=sort)
    taken = [batches.take(batch, rows) for rows in split.rows]
    assert [part["index_B"].tolist() for part in taken] == tiny.row_sets(batch, parts, sort)
    assert max(len(p["index_B"]) for p in taken) - min(len(p["index_B"]) for p in taken) <= 1
    for part in taken:
        assert part["input_ids_BT"].shape == part["attention_mask_BT"].shape
        assert part["attention_mask_BT"][:, -1].any()  # trimmed to the longest
        assert part["step"] == tiny.STEP
    back = split.batch_order([part["index_B"] for part in taken])
    assert back.tolist() == list(range(10))
    again = split.in_parts(back)
    assert all(torch.equal(a, p["index_B"]) for a, p in zip(again, taken, strict=True))


def test_left_padding_is_not_trimmed() -> None:
    mask = torch.tensor([[0, 0, 1], [0, 1, 1]])
    assert batches.lengths(mask).tolist() == [3, 3]
    part = batches.take({"attention_mask_BT": mask, "input_ids_BT": mask}, slice(0, 1))
    assert part["input_ids_BT"].tolist() == [[0, 0, 1]]


@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_mixed_precision_divides_the_same(name: Any) -> None:
    precision = Precision(name, tiny.CPU)
    batch, found = tiny.make_batch([8], 0), []
    cases = ((plain, 8, 1), (dga, 8, 1), (dga, 2, 0), (dga, 2, 1), (dga, 2, 9))
    for module, rows, keep in cases:
        task = tiny.TinyTask(rows_interact=True)
        model = tiny.replicas(tiny.make_model(dropout=0.0).float())
        if name == "fp16":  # it starts at a scale of 65536, which the optimizer's step lowers
            model.scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        runner = schema.Runner(keep_graphs=keep)
        data = schema.Data(batch_size_train=rows)
        step = module.build(
            runner, data, task=task, model=model, precision=precision, device=tiny.CPU
        )  # fmt: skip
        losses = step(batch, 0)
        scale = model.scaler.get_scale()
        found.append({n: g / scale for n, g in tiny.gradients(model).items()})
        assert math.isfinite(losses["loss"])
    undivided, whole, *divided = found
    assert all(torch.equal(undivided[n], whole[n]) for n in whole)
    assert all(torch.equal(each[n], divided[0][n]) for each in divided for n in whole)
    exact = tiny.make_step(tiny.TinyTask(), tiny.replicas(model.module.double()), None)
    exact(batch, 0)
    want = tiny.gradients(model)
    for got in (whole, divided[0]):
        assert tiny.largest_error({n: g.double() for n, g in got.items()}, want) < 0.1


class MixedTask:
    """The real dual encoder and mixup loss over towers of a few weights."""

    rows_interact = True

    def __init__(self) -> None:
        config = schema.Loss(name="MixUpNCE", mixup=schema.Mixup(beta=5.0, modality="both"))
        self.loss = nce.build(config)

    def build_model(self) -> DualEncoder:
        image, text = nn.Sequential(nn.Flatten(), nn.Linear(12, 5)), TextMean()
        image.width = 5
        return DualEncoder(image, text, 4, self.loss.parameters, {}, [0.5] * 3, [0.5] * 3)

    def features(self, model: Any, batch: Any) -> Features:
        mix = self.loss.mix(batch["step"], 0)
        outputs = model(batch, mix)
        return Features(
            outputs, {"logit_scale": outputs.pop("logit_scale")}, {"lam": mix.lam}
        )  # fmt: skip

    def losses(self, features: Features) -> dict[str, torch.Tensor]:
        return self.loss(features)


class TextMean(nn.Module):
    width = 5

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 5)

    def forward(self, input_ids_BT: torch.Tensor, attention_mask_BT: torch.Tensor) -> torch.Tensor:
        weight_BT1 = attention_mask_BT[..., None].to(self.embed.weight.dtype)
        return (self.embed(input_ids_BT) * weight_BT1).sum(1) / weight_BT1.sum(1)


@pytest.mark.parametrize("keep", [0, 1, 9])
def test_mixup_pairs_rows_within_a_sub_batch(keep: int) -> None:
    batch, task = tiny.make_batch([10], 0), MixedTask()
    with rng.isolated(0, tiny.CPU):
        model = task.build_model().double()
    losses = tiny.make_step(task, model, 3, keep)(batch, tiny.STEP)
    got = tiny.gradients(model)

    lam = task.loss.mix(tiny.STEP, 0).lam
    sets = tiny.row_sets(batch, 4, sort=False)
    outputs = [model(batches.take(batch, rows), task.loss.mix(tiny.STEP, 0))
               for rows in map(torch.tensor, sets)]  # fmt: skip
    image, text = (torch.cat([o[name] for o in outputs]) for name in ("image_BD", "text_BD"))
    partner = torch.tensor([row for rows in sets for row in reversed(rows)])
    logits, target = model.logit_scale.exp() * image @ text.T, torch.arange(10)
    loss = sum(
        lam * F.cross_entropy(side, target) + (1 - lam) * F.cross_entropy(side, partner)
        for side in (logits, logits.T)
    ) / 2  # fmt: skip
    loss.backward()
    assert abs(losses["loss"] - loss) < 1e-12
    assert losses["lam"] == pytest.approx(lam)
    assert tiny.largest_error(got, tiny.gradients(model)) < 1e-10


def test_ddp_refuses_unknown_options_and_leaves_one_process_bare() -> None:
    model = tiny.make_model()
    assert tiny.replicas(model).wrapped is model
    with pytest.raises(UserError, match="bucket_cap_mb"):
        config = schema.Config(dist=schema.Dist(param={"bucket_cap": 1}))
        ddp.check(config, tiny.CPU, "fp32")


@pytest.mark.slow
def test_compiled_model() -> None:
    """Keeping, measuring and replaying work through a compiled model too."""
    model, batch = tiny.make_model(dropout=0.0), tiny.make_batch([8], 0)
    tiny.make_step(tiny.TinyTask(), model, None)(batch, 0)
    want = tiny.gradients(model)
    tiny.make_step(tiny.TinyTask(), torch.compile(model), 2)(batch, 0)
    assert tiny.largest_error(tiny.gradients(model), want) < 1e-10
