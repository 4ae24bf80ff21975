"""Runs of ten steps by DDP and by what shares models out, whose losses and weights can be compared.

found = run(curves, 2, [Case("clip"), Case("clip", "fsdp2")], folder)[0]
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine.config import schema
from engine.dist import collectives
from engine.models.parameters import add_lora
from engine.registry import find
from engine.train.checkpoint import Checkpoint, CheckpointStore
from engine.train.precision import Precision
from engine.train.state import build_state
from engine.train.steps import batches, dga, plain
from engine.types import Batch
from tests.tasks import test_caption as caption
from tests.tasks import test_vqa as vqa
from tests.train import test_exact as clip
from tests.train import tiny

COUNTS = [5, 4]  # rows of each rank
STEPS, STOP, ORDER = 10, 5, {"seed": 0}
LOWEST = 1.9921875  # of logit_scale, which starts at 2 and would go below
Curve = tuple[list[float], list[float], dict[str, Tensor]]  # losses, norms, weights at the end


@dataclass(frozen=True)
class Case:
    """One run. ``param`` are the items of ``dist.param``; a ``config`` lies in the folder given."""

    task: str
    dist: str = "torch"
    param: tuple[tuple[str, Any], ...] = ()
    rows: int | None = None  # of a sub-batch, under dga
    precision: Any = "fp32"
    disturbed: bool = False  # steps left out, and the model looked at, on the way
    again: bool = False  # the decoder's activations are computed again in backward

    def by_ddp(self) -> Case:
        return replace(self, dist="torch", param=(), again=False)


class Run:
    """A model, its optimizer and its step, moved as the loop would move them."""

    def __init__(self, case: Case, folder: Path, checkpoint: Checkpoint | None = None) -> None:
        self.case = case
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.task: Any = make_task(case.task, again=case.again)
        self.losses_of = self.task.losses
        param = {k: str(folder / v) if k == "config" else v for k, v in case.param}
        config = schema.Config(
            data=schema.Data(batch_size=10),
            dist=schema.Dist(name=case.dist, param=param),
            optim=schema.Optim(
                lr=schema.Lr(init=3e-3, warmup_steps=2), grad_clip=0.5,
                param={"weight_decay": 0.1}, groups=groups(case.task),
            ),
        )  # fmt: skip
        module = make_model(case.task, self.task)
        precision, part = Precision(case.precision, tiny.CPU), find("dist", case.dist)
        self.state = build_state(config, module, part, tiny.CPU, precision, STEPS, checkpoint)
        if checkpoint is not None:
            self.state.restore(checkpoint, ORDER)
        self.gradients = (plain if case.rows is None else dga).build(
            schema.Runner(seed=tiny.SEED, keep_graphs=1),
            schema.Data(batch_size_train=(case.rows or 1) * collectives.world()),
            task=self.task,
            model=self.state.parallel,
            precision=self.state.precision,
            device=tiny.CPU,
        )

    def go(self, steps: range) -> Run:
        """Take ``steps``; where disturbed, 3 is left out and 5 is not finite."""
        for step in steps:
            spoilt = math.nan if self.case.disturbed and step == 5 else 1.0
            self.task.losses = lambda features, by=spoilt: {
                "loss": self.losses_of(features)["loss"] * by
            }
            losses = self.gradients(self.batch(step), step)
            self.state.set_lr()
            self.norms.append(self.state.clip())
            sound = math.isfinite(self.norms[-1]) or self.state.parallel.scales_loss
            if sound and not (self.case.disturbed and step == 3):
                self.state.parallel.update()
                self.losses.append(mean(losses["loss"]))
            else:
                self.state.skip()
                self.losses.append(self.look(step))
            self.state.step = step + 1
        return self

    @torch.no_grad()
    def look(self, step: int) -> float:
        """The whole model's loss in evaluation; one rank asks it more often than the other."""
        with self.state.parallel.whole():
            self.state.module.eval()
            for _ in range(1 + collectives.rank()):
                features = self.task.features(self.state.module, self.batch(step))
            self.state.module.train()
        return mean(self.losses_of(features)["loss"])

    def batch(self, step: int) -> Batch:
        """The rows of this rank, in an order that hangs on the step."""
        rank = collectives.rank()
        if self.case.task == "clip":
            batch = clip.make_batch(rank, COUNTS)
        elif self.case.task == "vqa":  # images at one rank, at the other, at none
            images = [([1, 2, 0, 1, 1], [0] * 4), ([0] * 5, [2, 0, 1, 1]), ([0] * 5, [0] * 4)]
            batch = vqa.make_batch(self.task, [*images[step % 3]], rank)
        else:
            batch = caption.make_batch(self.task, COUNTS, rank)
        return batches.take(batch, torch.arange(COUNTS[rank]).roll(step)) | {"step": step}

    def curve(self) -> Curve:
        return self.losses, self.norms, dict(self.state.parallel.weights())


def make_task(name: str, *, again: bool = False) -> Any:
    """clip, vqa, or a caption decoder's; its activations may be computed ``again``."""
    if name == "clip":
        return clip.make_task({"name": "Sigmoid"}, "all", -1)
    task = vqa.make_task() if name == "vqa" else caption.make_task(name)
    decoder = task.config.model.decoder.model_copy(update={"gradient_checkpointing": again})
    model = task.config.model.model_copy(update={"decoder": decoder})
    task.config = task.config.model_copy(update={"model": model})
    return task


def make_model(name: str, task: Any) -> nn.Module:
    """fp32; a bound that is reached on the way for clip, low-rank adapters for t5_cross."""
    module: Any = {"clip": clip, "vqa": vqa}.get(name, caption).make_model(task)
    if name == "clip":
        module.bounds = {"logit_scale": (LOWEST, None)}
    if name == "t5_cross":
        with torch.random.fork_rng():
            torch.manual_seed(0)
            add_lora(module, [r"\.(q|v)\."], [], schema.Lora(rank=2, alpha=4))
    return module.float().train()


def groups(task: str) -> list[schema.ParamGroup]:
    """Frozen parameters, rates of groups, adapters."""
    group = schema.ParamGroup
    if task == "clip":
        return [group(pattern="^text_encoder.embed", train="freeze"),
                group(pattern="^image", lr_scale=0.5)]  # fmt: skip
    if task in ("causal", "vqa"):
        return []
    return [group(pattern=r"\.(q|v)\.", train="lora"), group(pattern="Norm|^connector"),
            group(pattern="layer_norm"), group(pattern=".", train="freeze")]  # fmt: skip


def mean(loss: Tensor) -> float:
    losses = collectives.all_gather_json(float(loss))
    return sum(losses) / len(losses)


def curves(cases: Sequence[Case], folder: Path) -> list[Curve]:
    """On each rank: what the cases give (weights on rank 0)."""
    return [Run(case, folder).go(range(STEPS)).curve() for case in cases]


def stopped(cases: Sequence[Sequence[Case]], folder: Path) -> list[list[Curve]]:
    """Each first case run through; then again from its checkpoint at STOP, by each of its list.

    The checkpoints are left in ``folder/run0/step_5`` …
    """
    found = []
    for number, others in enumerate(cases):
        first = Run(others[0], folder).go(range(STOP))
        place = folder / f"run{number}"
        with CheckpointStore(place, writer=collectives.rank() == 0) as store:
            model, state = first.state.parallel.weights(), first.state.capture(ORDER)
            store.save(STOP, model=model, state=state, config_text="")
        collectives.barrier()
        checkpoint = Checkpoint.read(place / f"step_{STOP}")
        ends = [first, *(Run(case, folder, checkpoint) for case in others)]
        found.append([ran.go(range(STOP, STEPS)).curve() for ran in ends])
    return found


def assert_same_curve(found: Curve, want: Curve, case: Case, bound: float) -> None:
    """Losses (5 to 15) to ``bound``, norms to a share of it, weights' names, shapes and types."""
    assert max(want[0]) - min(want[0]) > 0.1
    assert max(abs(a - b) for a, b in zip(found[0], want[0], strict=True)) <= bound
    finite = [(a, b) for a, b in zip(found[1], want[1], strict=True) if math.isfinite(b)]
    assert len(finite) == STEPS - case.disturbed
    assert max(abs(a - b) / b for a, b in finite) <= bound
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in found[2].items()} == {
        name: (tensor.shape, tensor.dtype) for name, tensor in want[2].items()
    }
    if case.task == "clip":
        assert found[2]["logit_scale"].item() == pytest.approx(LOWEST, abs=0)


def assert_went_on(whole: Curve, again: Curve, *moved: Curve) -> None:
    """Bit for bit by the same strategy, nearly so by the others."""
    assert again[:2] == (whole[0][STOP:], whole[1][STOP:])
    for name, tensor in whole[2].items():
        assert torch.equal(again[2][name], tensor), name
    for losses, _, _ in moved:
        assert max(abs(a - b) for a, b in zip(losses, whole[0][STOP:], strict=True)) <= 1e-5


def assert_read_alone(place: Path, folder: Path) -> None:
    """One process and no sharing at all: each parameter has the state that was saved of it."""
    checkpoint = Checkpoint.read(place)
    state = Run(Case("clip"), folder, checkpoint).state
    want, found = checkpoint.state()["optimizer"], state.parallel.optimizer.state_dict()
    assert state.step == STOP and len(found["state"]) == len(want["state"]) == 8
    for number, values in found["state"].items():
        assert values["step"] == STOP
        for name in ("exp_avg", "exp_avg_sq"):
            assert values[name].any()
            assert torch.equal(values[name], want["state"][number][name])
