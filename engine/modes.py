"""The modes of a run: train, evaluate, check. Each puts the parts together and sets them going."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from engine import registry
from engine.config.dump import resolved_yaml
from engine.config.schema import Config
from engine.data.bad_samples import BadSamples
from engine.data.sources import open_source
from engine.data.text.choose import FOLDER as TOKENIZER_FOLDER
from engine.data.text.choose import choose_tokenizer
from engine.data.text.tokenizer import TextTokenizer
from engine.dist import collectives
from engine.errors import UserError
from engine.evals.run import Evaluations
from engine.logs.progress import Progress
from engine.logs.report import write_report
from engine.logs.run_log import open_log
from engine.models.towers import load_tower
from engine.train import optim
from engine.train.checkpoint import Checkpoint, CheckpointStore, load_model, open_checkpoint
from engine.train.lars import LARS
from engine.train.loop import Training
from engine.train.plan import Plan, make_plan, order_key
from engine.train.precision import Precision
from engine.train.signals import StopRequest
from engine.train.state import TrainState, make_state


@dataclass
class Setup:
    """What every mode starts from; the parts are made when first asked for."""

    task_name: str
    config: Config
    device: torch.device
    stop: StopRequest
    warn: Callable[[str], None] = field(default=lambda text: Progress().message(f"warning: {text}"))

    @cached_property
    def run_dir(self) -> Path:
        """Where the run writes: ``ckpt.dir/data.exp_name``."""
        return Path(self.config.ckpt.dir) / (self.config.data.exp_name or self.task_name)

    @cached_property
    def precision(self) -> Precision:
        return Precision.choose(self.config.dist, self.device)

    @cached_property
    def checkpoint(self) -> Checkpoint | None:
        """Where the run goes on: ``ckpt.resume``, else the newest in the run's own folder."""
        ckpt = self.config.ckpt
        found: Checkpoint | None = None
        if collectives.rank() == 0:  # checks every byte, which once is enough
            if ckpt.resume:
                found = open_checkpoint(ckpt.resume, key="ckpt.resume", warn=self.warn)
            elif ckpt.auto_resume:
                store = CheckpointStore(self.run_dir / "checkpoints", writer=False)
                found = store.latest(self.warn)
        place = collectives.broadcast_json(str(found.path) if found else None)
        if found is None and place is not None:
            path = Path(place)
            found = (
                Checkpoint(path, None) if path.is_file() else Checkpoint.read(path, contents=False)
            )
        return found

    @cached_property
    def tokenizer(self) -> TextTokenizer:
        """That of the checkpoint's run or of this one, else a new one; rank 0's on every rank."""
        homes = [self.run_dir]
        if self.checkpoint is not None and self.checkpoint.step is not None:
            homes.insert(0, self.checkpoint.path.parents[1])
        state = None
        if collectives.rank() == 0:
            state = choose_tokenizer(self.config, homes, self._captions).state()
        return TextTokenizer.from_state(collectives.broadcast_json(state))

    def _captions(self) -> Iterator[str]:
        data = self.config.data
        for name in data.train_name:
            yield from open_source(name, "train", data, key="data.train_name").captions()

    @cached_property
    def task(self) -> Any:
        # a task without texts never asks for the tokenizer, and none is made
        return registry.find("tasks", self.task_name).build(self.config, lambda: self.tokenizer)

    def build_model(self) -> nn.Module:
        """The task's model on the device, with the weights that the configuration names."""
        model = self.config.model
        torch.manual_seed(self.config.runner.seed)
        module = self.task.build_model()
        for part, init in (
            ("image_encoder", model.image_encoder.init),
            ("text_encoder", model.text_encoder.init),
        ):
            if init:
                key = f"model.{part}.init"
                tensors = open_checkpoint(init, key=key, warn=self.warn).model()
                load_tower(getattr(module, part), tensors, part, key=key)
        if model.init:
            tensors = open_checkpoint(model.init, key="model.init", warn=self.warn).model()
            load_model(module, tensors, key="model.init")
        if self.config.runner.compile:
            module.compile(dynamic=True)
        return module.to(self.device, self.precision.weights)

    @cached_property
    def evaluate(self) -> Evaluations:
        """A function of a module that gives its figures."""
        return Evaluations(
            self.config,
            self.task,
            self.device,
            self.precision.autocast,
            self.warn if collectives.rank() == 0 else lambda text: None,
            probe_optimizer=LARS if self.config.eval.linear_probe.method == "lars" else None,
            stopped=lambda: collectives.any_true(self.stop.requested),
        )


def train(setup: Setup) -> None:
    """Train to the end, or go on from where the run stopped."""
    config, rank = setup.config, collectives.rank()
    plan = make_plan(config, collectives.world())
    checkpoint, text = setup.checkpoint, resolved_yaml(config)
    state = build_state(setup, plan)
    if checkpoint is not None:
        state.restore(checkpoint, order_key(config, plan))
    store = CheckpointStore(
        setup.run_dir / "checkpoints", config.ckpt.keep_last, writer=rank == 0
    )  # from here on the run writes: whatever is wrong with its configuration was said before
    if rank == 0:
        (setup.run_dir / "config.yaml").write_text(text, encoding="utf8")
        setup.tokenizer.save(setup.run_dir / TOKENIZER_FOLDER)
    bad = BadSamples(
        setup.run_dir / "bad_samples.jsonl", config.data.max_bad_fraction, write=rank == 0
    )
    with open_log(
        config, setup.run_dir, rank=rank, total_steps=plan.total_steps, resume_step=state.step
    ) as log:
        log.message(greeting(setup, plan, state))
        training = Training(
            config, text, setup.task, plan, state, store, bad, log, setup.stop, setup.device,
            evaluate=lambda: setup.evaluate(state.module),
        )  # fmt: skip
        metrics = training.run()
        if setup.stop.requested:
            log.message(
                f"{setup.stop.name}: saved at step {state.step} of {plan.total_steps}; "
                "the same command goes on from there"
            )
        elif not metrics and config.eval.epoch_interval is not None:  # nothing was left to train
            log.row({"step": state.step, **setup.evaluate(state.module)})
        log.message(f"run folder: {setup.run_dir}")
    if rank == 0:
        write_report(setup.run_dir, gallery=setup.evaluate.gallery)


def build_state(setup: Setup, plan: Plan) -> TrainState:
    """The model, wrapped for the world it runs in, and its optimizer."""
    module = setup.build_model()
    module.train()
    optim.freeze(module, setup.config.optim.groups)  # before the wrapper looks at what trains
    dist = setup.config.dist
    wrapped = registry.find("dist", dist.name, key="dist.name").build(module, dist, setup.device)
    return make_state(setup.config, module, wrapped, setup.precision, plan.total_steps)


def greeting(setup: Setup, plan: Plan, state: TrainState) -> str:
    """One line that says what is about to happen."""
    number = sum(parameter.numel() for parameter in state.module.parameters())
    start = f", from step {state.step}" if state.step else ""
    return (
        f"{setup.task_name}: {number / 1e6:.1f}M parameters, {setup.precision.name} on "
        f"{collectives.world()} × {setup.device.type}; {sum(map(len, plan.sources)):,} samples, "
        f"{plan.steps_per_epoch} steps × {plan.epochs} epochs of "
        f"{setup.config.data.batch_size}{start}"
    )


def evaluate(setup: Setup) -> None:
    """Score a checkpoint on every ``data.valid_name`` and labelled set, and print the table."""
    checkpoint = setup.checkpoint
    if checkpoint is None:
        raise UserError(
            f"there is no checkpoint in {setup.run_dir}: train first, or name one by ckpt.resume",
            key="ckpt.resume",
        )
    module = setup.build_model()
    load_model(module, checkpoint.model(), key="ckpt.resume")
    report_figures(setup, module, checkpoint.step, str(checkpoint.path))


def probe(setup: Setup) -> None:
    """Fit and score a linear probe on the tower that ``model.image_encoder`` names."""
    report_figures(setup, setup.build_model(), None, setup.config.model.image_encoder.init)


def report_figures(setup: Setup, module: nn.Module, step: int | None, origin: str | None) -> None:
    """Print an evaluation's table, and add it to the run folder's ``evaluations.jsonl``."""
    metrics = setup.evaluate(module)
    if collectives.rank() == 0 and metrics:
        Progress().row({"step": step or 0, **metrics})
        setup.run_dir.mkdir(parents=True, exist_ok=True)
        with (setup.run_dir / "evaluations.jsonl").open("a", encoding="utf8") as file:
            file.write(json.dumps({"step": step, "checkpoint": origin, **metrics}) + "\n")
