"""A small two-tower task in fp64 for the tests of steps, and its undivided loss as the oracle."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch._dynamo  # DDP imports it, for seconds: once here, not in every forked rank
import torch.nn.functional as F
from torch import Tensor, nn

from engine.config import schema
from engine.dist import collectives, ddp
from engine.dist.parallel import Parallel
from engine.losses import nce
from engine.train import rng
from engine.train.precision import Precision
from engine.train.steps import dga, plain
from engine.types import Batch, Features

CPU = torch.device("cpu")
FP32 = Precision("fp32", CPU)  # no autocast: fp64 stays fp64
SEED, STEP = 3, 11


class Towers(nn.Module):
    """An MLP for images (with batch norm if asked) and a masked transformer for texts."""

    def __init__(self, dropout: float = 0.3, norm: bool = False) -> None:
        super().__init__()
        self.image = nn.Sequential(
            nn.Flatten(),
            nn.Linear(12, 16),
            nn.BatchNorm1d(16) if norm else nn.Identity(),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(16, 6),
        )
        self.embed = nn.Embedding(20, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout, batch_first=True)
        self.project = nn.Linear(8, 6, bias=False)
        self.caption = nn.Linear(8, 1)
        self.logit_scale = nn.Parameter(torch.tensor([2.0]))

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        image_BC = batch["image_BCHW"].to(self.project.weight.dtype) / 255
        mask_BT = batch["attention_mask_BT"]
        hidden_BTD = self.layer(
            self.embed(batch["input_ids_BT"]), src_key_padding_mask=mask_BT.eq(0)
        )
        return {
            "image_BD": F.normalize(self.image(image_BC), dim=1),
            "text_BD": F.normalize(self.project(hidden_BTD[:, 0]), dim=1),
            "caption_loss_B": self.caption(hidden_BTD[:, 0]).square().squeeze(1),
            "index_B": batch["index_B"],
            "logit_scale": self.logit_scale,
        }


class TinyTask:
    """NCE of the towers plus a loss that each sample has for itself."""

    def __init__(self, rows_interact: bool = False) -> None:
        self.rows_interact = rows_interact
        self.loss = nce.build(schema.Loss())
        self.passes: list[bool] = []  # whether each forward recorded a graph

    def features(self, model: Callable[..., Any], batch: Batch) -> Features:
        self.passes.append(torch.is_grad_enabled())
        outputs = model(batch)
        shared = {"logit_scale": outputs.pop("logit_scale")}
        return Features(outputs, shared, {"lam": 1.0, "name": "tiny"})

    def losses(self, features: Features) -> dict[str, Tensor]:
        counts = collectives.row_counts(len(features.per_sample["image_BD"]))
        caption_B = features.per_sample["caption_loss_B"]
        caption = caption_B.sum() * collectives.world() / sum(counts)
        index_B = features.per_sample["index_B"]
        features.info["in_order"] = float((index_B.diff() == 1).all())
        contrast = self.loss(features)["loss"]
        return {"loss": contrast + caption, "caption": caption}


def make_model(dropout: float = 0.3, norm: bool = False) -> Towers:
    with rng.isolated(0, CPU):
        return Towers(dropout, norm).double()


def make_batch(counts: Sequence[int], rank: int) -> Batch:
    """The rows of ``rank``: uint8 images and right-padded texts of 1 to 7 tokens."""
    total, start = sum(counts), sum(counts[:rank])
    rows = slice(start, start + counts[rank])
    generator = torch.Generator().manual_seed(1)
    image = torch.randint(256, (total, 3, 2, 2), dtype=torch.uint8, generator=generator)
    ids = torch.randint(1, 20, (total, 7), generator=generator)
    length = torch.randint(1, 8, (total, 1), generator=generator)
    mask = (torch.arange(7) < length).long()
    return {
        "image_BCHW": image[rows],
        "input_ids_BT": (ids * mask)[rows],
        "attention_mask_BT": mask[rows],
        "index_B": torch.arange(total)[rows],
        "step": STEP,
    }


def replicas(model: nn.Module, precision: str = "fp32", **param: Any) -> ddp.Replicas:
    """``model`` as a run of this world holds it, with an optimizer that nothing asks."""
    config = schema.Config(dist=schema.Dist(param=param))
    return ddp.build(model, torch.optim.SGD(model.parameters()), config, CPU, precision)


def make_step(
    task: Any, model: nn.Module, rows: int | None, keep: Any = "auto", **runner: Any
) -> Callable[[Batch, int], dict[str, Tensor]]:
    """The dga step with sub-batches of ``rows`` on each rank; the plain one for None."""
    settings = schema.Runner(seed=SEED, keep_graphs=keep, **runner)
    data = schema.Data(batch_size_train=(rows or 1) * collectives.world())
    module = plain if rows is None else dga
    model = model if isinstance(model, Parallel) else replicas(model)
    return module.build(settings, data, task=task, model=model, precision=FP32, device=CPU)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter's gradient by name, which are then cleared."""
    found = {
        name.removeprefix("module."): parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    model.zero_grad(set_to_none=True)
    return found


def row_sets(batch: Batch, parts: int, sort: bool) -> list[list[int]]:
    """Rows of each sub-batch, written out: sorted by length where asked, then cut evenly."""
    n = len(batch["index_B"])
    lengths = batch["attention_mask_BT"].sum(1).tolist()
    order = sorted(range(n), key=lambda row: lengths[row]) if sort else list(range(n))
    return [order[n * j // parts : n * (j + 1) // parts] for j in range(parts)]


def oracle(
    model: Towers, counts: Sequence[int], rows: int, sort: bool = True
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of all ranks' rows in one graph: nothing detached, nothing decoupled.

    Features are computed sub-batch by sub-batch with the same random numbers; the loss is two
    cross-entropies over the whole matrix of similarities.
    """
    parts = -(-max(counts) // rows)
    image, text, caption = [], [], []
    for rank in range(len(counts)):
        batch = make_batch(counts, rank)
        sets = row_sets(batch, parts, sort and parts > 1)
        done: dict[int, tuple[Tensor, ...]] = {}
        for j, chosen in enumerate(sets):
            longest = int(batch["attention_mask_BT"][chosen].sum(1).max())
            part = {
                name: value[chosen][:, :longest] if name.endswith("_BT") else value[chosen]
                for name, value in batch.items()
                if isinstance(value, Tensor)
            }
            with rng.isolated(rng.derive(SEED, STEP, rank, j), CPU):
                out = model(part)
            for place, row in enumerate(chosen):
                done[row] = tuple(out[n][place] for n in ("image_BD", "text_BD", "caption_loss_B"))
        for row in range(counts[rank]):
            for found, value in zip((image, text, caption), done[row], strict=True):
                found.append(value)
    logits = model.logit_scale.exp() * torch.stack(image) @ torch.stack(text).T
    target = torch.arange(len(logits))
    contrast = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    loss = contrast + torch.stack(caption).mean()
    loss.backward()
    return loss.detach(), gradients(model)


def largest_error(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """The largest relative error of any parameter's gradient, in norm (0 counts as 1e-3)."""
    assert got.keys() == want.keys()
    return max(float((got[n] - want[n]).norm() / want[n].norm().clamp_min(1e-3)) for n in want)
