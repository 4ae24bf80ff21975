"""``--mode=check``: what a run would be, without training it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from engine import registry
from engine.config.dump import resolved_yaml
from engine.data.loader import train_batches
from engine.data.permutation import Indices
from engine.data.reader import limits_of
from engine.data.samplers.pool import Sampler
from engine.data.stream.loader import StreamLoader
from engine.dist import collectives
from engine.models.memory import count_flops, estimate_memory
from engine.models.parameters import format_table
from engine.modes.state import build_state, check_dist
from engine.run import Run
from engine.train.plan import Plan, make_plan
from engine.train.precision import DTYPES
from engine.train.state import TrainState
from engine.types import Batch, Sample, Task

_SAMPLED, _STEPS = 32, 12  # samples of each of so many steps, that the estimates are made from
_COUNTED = 10**12  # FLOPs: a large model's are counted over fewer steps
_GIB = 2**30


def run(run: Run) -> None:
    """Print the resolved configuration, parameters, data plan, and what a step will cost."""
    config = run.config
    check_dist(run)
    plan = make_plan(config, collectives.world())
    state = build_state(run, plan.total_steps, sharded=False)
    batches, samples = sample_batches(run, plan)
    lines = [
        resolved_yaml(config),
        "# parameters",
        format_table(state.parameters),
        "\n# data",
        *data_plan(run, plan),
        *described_sample(run.task, samples),
        "\n# cost",
        *cost(run, plan, state, batches),
    ]
    if collectives.rank() == 0:
        print("\n".join(lines))


def data_plan(run: Run, plan: Plan) -> list[str]:
    """What is read, in which portions, for how long."""
    data = run.config.data
    world = collectives.world()
    sets = [f"{source.name}: {len(source):,} samples" for source in plan.datasets]
    sub = f", {data.batch_size_train} at a time" if data.batch_size_train else ""
    return [
        *sets,
        f"order: {data.train_type}, seed {run.config.runner.seed}",
        f"batch: {data.batch_size} over {world} process(es){sub}",
        f"steps: {plan.steps_per_epoch} an epoch × {plan.epochs} = {plan.total_steps}",
        f"evaluated on: {', '.join(data.valid_name) or 'nothing'}",
        f"run folder: {run.run_dir}"
        + (f", continues from {run.checkpoint.path}" if run.checkpoint else ""),
    ]


def described_sample(task: Task, samples: Sequence[Sample]) -> list[str]:
    """A sample's prompt and target, where the task has them: the first one with an image if there
    is one."""
    sample = next((one for one in samples if one.images), samples[0])
    described = task.describe(sample)
    if described is None:
        return []
    prompt, target = described
    images = len(sample.images)
    return [f"\n# a sample, with {images} image(s)", f"prompt: {prompt!r}", f"target: {target!r}"]


def sample_batches(run: Run, plan: Plan) -> tuple[list[Batch], list[Sample]]:
    """The first few samples of some steps all over the first epoch, as batches on the CPU, and
    those of the first step; of streams, what comes first.

    Steps differ, where datasets with texts of other lengths are mixed or take turns.
    """
    first: list[Sample] = []

    def collate(samples: list[Sample]) -> Batch:
        first.extend(() if first else samples)
        return run.task.batch(samples)

    transform, number = run.transform("train"), min(_STEPS, plan.steps_per_epoch)
    options: dict[str, Any] = {
        "first_step": 0, "rank": 0, "world": 1, "seed": run.config.runner.seed,
        "num_workers": 0, "limits": limits_of(run.config.data, run.task),
    }  # fmt: skip
    found: Iterable[Any]
    if plan.streamed:  # a whole shuffle window is not waited for
        streams = [replace(stream, window=_SAMPLED) for stream in plan.streamed]
        options |= {"batch_size": _SAMPLED, "total_steps": 1}
        found = StreamLoader(streams, transform, collate, **options)
    else:
        assert plan.sampler is not None  # streams alone have none
        steps = [plan.steps_per_epoch * place // number for place in range(number)]
        sampler = _First(plan.sampler, _SAMPLED, steps)
        options |= {"total_steps": number, "steps_per_epoch": number}
        found = train_batches(plan.sources, sampler, transform, collate, **options)
    return [batch for _, batch, _ in found], first


class _First(Sampler):
    """A sampler cut down to some steps, and the first few rows of each."""

    def __init__(self, sampler: Sampler, rows: int, chosen: Sequence[int]) -> None:
        self.sampler, self.rows, self.chosen = sampler, rows, chosen

    def batch(self, epoch: int, step: int) -> Indices:
        return self.sampler.batch(epoch, self.chosen[step])[: self.rows]


def cost(run: Run, plan: Plan, state: TrainState, batches: Sequence[Batch]) -> list[str]:
    """Floating-point operations of the run, and bytes of a step on one device."""
    config, world, precision = run.config, collectives.world(), run.precision.name
    module, data = state.module.cpu(), config.data
    pair = mean_flops(module, batches)
    samples = min(sum(map(len, plan.datasets)), plan.steps_per_epoch * data.batch_size)
    memory = estimate_memory(
        module,
        batches[0],
        -(-(data.batch_size_train or data.batch_size) // world),
        dtype=DTYPES.get(precision, torch.float32),
        global_rows=data.batch_size,
        dim=config.model.projection.dim,
    )
    # dist.name may divide these among the ranks
    whole = {name: memory[name] for name in ("weights", "gradients", "optimizer")}
    part = registry.find("dist", config.dist.name, key="dist.name")
    memory |= part.device_bytes(config, precision, world, whole)
    parts = ", ".join(f"{part} {size / _GIB:.2f}" for part, size in memory.items())
    return [
        f"training compute: {pair / 1e6:.1f} MFLOP a pair (forward and backward), "
        f"{pair * samples * plan.epochs / 1e12:.2f} TFLOP in all",
        f"memory of a device, estimated: {sum(memory.values()) / _GIB:.2f} GiB ({parts})",
    ]


def mean_flops(module: nn.Module, batches: Sequence[Batch]) -> float:
    """FLOPs of a sample, forward and backward, over as many batches as can soon be counted."""
    counts: list[int] = []
    for batch in batches:
        if counts and sum(counts) + counts[0] > _COUNTED:
            break
        counts.append(count_flops(module, batch))
    return sum(counts) / sum(len(batch["index_B"]) for batch in batches[: len(counts)])
