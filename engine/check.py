"""``--mode=check``: what a run would be, without training it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from engine import registry
from engine.config.dump import resolved_yaml
from engine.data.loader import train_batches
from engine.data.reader import limits_of
from engine.data.stream.loader import StreamLoader
from engine.data.transforms import pipeline
from engine.dist import collectives
from engine.models.memory import Memory, count_flops, estimate_memory
from engine.models.parameters import format_table
from engine.modes import build_state, check_dist
from engine.setup import Setup
from engine.train.plan import Plan, make_plan
from engine.types import Batch, Sample

_SAMPLED, _STEPS = 32, 12  # samples of each of so many steps, that the estimates are made from
_COUNTED = 10**12  # FLOPs: a large model's are counted over fewer steps
_GIB = 2**30


def check(setup: Setup) -> None:
    """Print the resolved configuration, parameters, data plan, and what a step will cost."""
    config = setup.config
    check_dist(setup)
    plan = make_plan(config, collectives.world())
    state = build_state(setup, plan, shares=False)
    seen = _Seen(setup.task.batch)
    batches = sample_batches(setup, plan, seen)
    lines = [
        resolved_yaml(config),
        "# parameters",
        format_table(state.parameters),
        "\n# data",
        *data_plan(setup, plan),
        *told_sample(setup, seen.samples),
        "\n# cost",
        *cost(setup, plan, state, batches),
    ]
    if collectives.rank() == 0:
        print("\n".join(lines))


def data_plan(setup: Setup, plan: Plan) -> list[str]:
    """What is read, in which portions, for how long."""
    data = setup.config.data
    world = collectives.world()
    sets = [f"{source.name}: {len(source):,} samples" for source in plan.sources]
    sub = f", {data.batch_size_train} at a time" if data.batch_size_train else ""
    return [
        *sets,
        f"order: {data.train_type}, seed {setup.config.runner.seed}",
        f"batch: {data.batch_size} over {world} process(es){sub}",
        f"steps: {plan.steps_per_epoch} an epoch × {plan.epochs} = {plan.total_steps}",
        f"evaluated on: {', '.join(data.valid_name) or 'nothing'}",
        f"run folder: {setup.run_dir}"
        + (f", goes on from {setup.checkpoint.path}" if setup.checkpoint else ""),
    ]


class _Seen:
    """A task's collate that remembers what it was given first."""

    def __init__(self, collate: Callable[[list[Sample]], Batch]) -> None:
        self.collate = collate
        self.samples: list[Sample] = []

    def __call__(self, samples: list[Sample]) -> Batch:
        self.samples = self.samples or samples
        return self.collate(samples)


def told_sample(setup: Setup, samples: Sequence[Sample]) -> list[str]:
    """What a task that speaks makes of a sample, the first with an image if there is one: what it
    is given, and what it learns to say."""
    told = getattr(setup.task, "told", None)
    if told is None:
        return []
    sample = next((one for one in samples if one.images), samples[0])
    prompt, target = told(sample)
    images = len(sample.images)
    return [f"\n# a sample, with {images} image(s)", f"prompt: {prompt!r}", f"target: {target!r}"]


def sample_batches(setup: Setup, plan: Plan, collate: _Seen) -> list[Batch]:
    """The first few samples of some steps all over the first epoch, as batches on the CPU.

    Steps differ, where datasets with texts of other lengths are mixed or take turns.
    """
    transforms = setup.config.transforms
    transform = pipeline.build(
        transforms.train_transforms,
        transforms,
        key="transforms.train_transforms",
        decoder=setup.config.data.decoder,
    )
    if plan.streamed:
        return [streamed_batch(setup, plan, transform, collate)]
    number = min(_STEPS, plan.steps_per_epoch)
    steps = [plan.steps_per_epoch * place // number for place in range(number)]
    found = train_batches(
        plan.sources,
        _First(plan.sampler, _SAMPLED, steps),
        transform,
        collate,
        first_step=0,
        total_steps=number,
        steps_per_epoch=number,
        rank=0,
        world=1,
        seed=setup.config.runner.seed,
        num_workers=0,
        limits=limits_of(setup.config.data, setup.task),
    )
    return [batch for _, batch, _ in found]


def streamed_batch(setup: Setup, plan: Plan, transform: Any, collate: _Seen) -> Batch:
    """A few samples that are not waited for until a whole shuffle window has come."""
    loader = StreamLoader(
        [replace(source, window=_SAMPLED) for source in plan.streamed],
        transform,
        collate,
        batch_size=_SAMPLED,
        first_step=0,
        total_steps=1,
        rank=0,
        world=1,
        seed=setup.config.runner.seed,
        limits=limits_of(setup.config.data, setup.task),
        num_workers=0,
    )
    return next(batch for _, batch, _ in loader)


class _First:
    """A sampler cut down to some steps, and the first few rows of each."""

    def __init__(self, sampler: Any, rows: int, chosen: Sequence[int]) -> None:
        self.sampler, self.rows, self.chosen = sampler, rows, chosen

    def batch(self, epoch: int, step: int) -> Any:
        return self.sampler.batch(epoch, self.chosen[step])[: self.rows]


def cost(setup: Setup, plan: Plan, state: Any, batches: Sequence[Batch]) -> list[str]:
    """Floating-point operations of the run, and bytes of a step on one device."""
    data, world = setup.config.data, collectives.world()
    module = state.module.cpu()
    rows = -(-(data.batch_size_train or data.batch_size) // world)
    pair = mean_flops(module, batches)
    samples = min(sum(map(len, plan.sources)), plan.steps_per_epoch * data.batch_size)
    names = {"bf16": torch.bfloat16, "fp16": torch.float16}
    memory = estimate_memory(
        module,
        batches[0],
        rows,
        dtype=names.get(setup.precision.name, torch.float32),
        global_rows=data.batch_size,
        dim=setup.config.model.projection.dim,
    )
    memory = shared_out(setup, memory)
    parts = ("weights", "gradients", "optimizer", "activations", "loss")
    told = ", ".join(f"{part} {getattr(memory, part) / _GIB:.2f}" for part in parts)
    return [
        f"training compute: {pair / 1e6:.1f} MFLOP a pair (forward and backward), "
        f"{pair * samples * plan.epochs / 1e12:.2f} TFLOP in all",
        f"memory of a device, estimated: {memory.total / _GIB:.2f} GiB ({told})",
    ]


def mean_flops(module: Any, batches: Sequence[Batch]) -> float:
    """FLOPs of a sample, forward and backward, over as many batches as can soon be counted."""
    counts: list[int] = []
    for batch in batches:
        if counts and sum(counts) + counts[0] > _COUNTED:
            break
        counts.append(count_flops(module, batch))
    return sum(counts) / sum(len(batch["index_B"]) for batch in batches[: len(counts)])


def shared_out(setup: Setup, memory: Memory) -> Memory:
    """What of ``memory`` is left on one device where ``dist.name`` divides it among the ranks."""
    dist = setup.config.dist
    part = registry.find("dist", dist.name, key="dist.name")
    whole = {name: getattr(memory, name) for name in ("weights", "gradients", "optimizer")}
    world, precision = collectives.world(), setup.precision.name
    return replace(memory, **part.device_bytes(setup.config, precision, world, whole))
