"""The modes of a run: train, evaluate, check. Each puts the parts together and sets them going."""

from __future__ import annotations

import json
from pathlib import Path
from urllib.parse import quote

import torch
from torch import nn

from engine import registry
from engine.config.dump import resolved_yaml
from engine.data.bad_samples import BadSamples
from engine.data.tar.damage import known_damage
from engine.data.text.choose import FOLDER as TOKENIZER_FOLDER
from engine.dist import collectives
from engine.evals.encode import check_size
from engine.logs.progress import Progress
from engine.logs.report import write_report
from engine.logs.run_log import RunLog, open_log
from engine.logs.samples import FOLDER as SAMPLES_FOLDER
from engine.logs.samples import write_samples
from engine.models.parameters import format_table
from engine.models.weights import load_tower
from engine.setup import Setup
from engine.train.checkpoint import CheckpointStore
from engine.train.loop import Training
from engine.train.plan import Plan, make_plan, order_key
from engine.train.state import TrainState
from engine.train.state import build_state as make_state
from engine.types import Metrics


def train(setup: Setup) -> None:
    """Train to the end, or go on from where the run stopped."""
    config, rank = setup.config, collectives.rank()
    check_dist(setup)
    plan = make_plan(config, collectives.world())
    for told in (text for source in plan.sources for text in known_damage(source)):
        if rank == 0:
            setup.warn(told)
    if config.eval.epoch_interval is not None:
        setup.evaluate.check()
    checkpoint, text = setup.checkpoint, resolved_yaml(config)
    state = build_state(setup, plan)
    if rank == 0:
        warn_of_mixed_statistics(setup, state.module)
    if checkpoint is not None:
        state.restore(checkpoint, order_key(config, plan))
    store = open_run(setup, state, text)  # what is wrong with the configuration was said before
    bad = BadSamples(
        setup.run_dir / "bad_samples.jsonl", config.data.max_bad_fraction, write=rank == 0
    )
    with open_log(
        config, setup.run_dir, rank=rank, total_steps=plan.total_steps, resume_step=state.step
    ) as log:
        log.message(greeting(setup, plan, state))
        training = Training(
            config, text, setup.task, plan, state, store, bad, log, setup.stop, setup.device,
            evaluate=lambda: evaluate_and_show(setup, state, log),
        )  # fmt: skip
        metrics = training.run()
        if setup.stop.requested:
            log.message(
                f"{setup.stop.name}: saved at step {state.step} of {plan.total_steps}; "
                "the same command goes on from there"
            )
        elif not metrics and config.eval.epoch_interval is not None:  # nothing was left to train
            log.row({"step": state.step, **evaluate_and_show(setup, state, log)})
        if bad.total:
            log.message(bad.told())
        log.message(f"run folder: {setup.run_dir}")
    close_run(setup, state)


def open_run(setup: Setup, state: TrainState, text: str) -> CheckpointStore:
    """From here on the run writes: what it was made with, and the place of its checkpoints."""
    run_dir, rank = setup.run_dir, collectives.rank()
    store = CheckpointStore(run_dir / "checkpoints", setup.config.ckpt.keep_last, writer=rank == 0)
    if rank == 0:
        (run_dir / "config.yaml").write_text(text, encoding="utf8")
        table = format_table(state.parameters)
        (run_dir / "parameters.txt").write_text(table + "\n", encoding="utf8")
        setup.tokenizer.save(run_dir / TOKENIZER_FOLDER)
    return store


def close_run(setup: Setup, state: TrainState) -> None:
    """Adapters on their own, and the report."""
    config, rank = setup.config, collectives.rank()
    if any(group.train == "lora" for group in config.optim.groups):
        from engine.models.adapters import save_adapters

        weights = state.parallel.weights()
        if rank == 0:
            save_adapters(state.module, setup.run_dir / "adapters", config.model.lora, weights)
    if rank == 0:
        write_report(setup.run_dir, galleries=setup.evaluate.galleries)


def evaluate_and_show(setup: Setup, state: TrainState, log: RunLog) -> Metrics:
    """The figures of the model as it is; its predictions and examples on the way."""
    with state.parallel.whole():
        metrics = setup.evaluate(state.module)
    save_predictions(setup, f"step_{state.step}")
    for dataset, examples in setup.evaluate.galleries.items():
        log.examples(state.step, dataset, examples)
    return metrics


def save_predictions(setup: Setup, label: str) -> None:
    """What the latest evaluation generated, in the run folder's ``samples``."""
    if collectives.rank() != 0:
        return
    for dataset, predictions in setup.evaluate.predictions.items():
        try:
            write_samples(
                setup.run_dir / SAMPLES_FOLDER, dataset, label, [p.to_json() for p in predictions]
            )
            if dataset in setup.evaluate.pictures:
                name = f"{quote(dataset, safe=' ')}.{label}.curve.png"
                setup.evaluate.pictures[dataset].save(setup.run_dir / SAMPLES_FOLDER / name)
        except OSError as error:  # a full disk, say: the figures are worth more
            setup.warn(f"predictions of {dataset} are not saved: {error}")


def check_dist(setup: Setup) -> None:
    """What of ``dist`` cannot work is said before any data is read."""
    part = registry.find("dist", setup.config.dist.name, key="dist.name")
    part.check(setup.config, setup.device, setup.precision.name)


def build_state(setup: Setup, plan: Plan, *, shares: bool = True) -> TrainState:
    """The model, wrapped for the world it runs in, and its optimizer.

    Without ``shares`` it stays whole, to be inspected, even where a run would shard it.
    """
    config = setup.config
    part = registry.find("dist", config.dist.name, key="dist.name")
    module = setup.build_model(torch.device("cpu") if part.SHARDS else setup.device)
    if config.eval.epoch_interval is not None and config.data.valid_name:
        check_size(module, config.transforms)
    return make_state(
        config, module, part if shares else None, setup.device, setup.precision,
        plan.total_steps, setup.checkpoint if shares else None,
    )  # fmt: skip


def warn_of_mixed_statistics(setup: Setup, module: nn.Module) -> None:
    """Say that batches of one source each and batch norm do not go together."""
    data = setup.config.data
    norms = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in module.modules())
    if norms and data.train_type == "debias" and len(data.train_name) > 1:
        setup.warn(
            "data.train_type debias gives batch norm one source at a time, while evaluation uses "
            "the statistics of all sources mixed: scores may collapse. Take an encoder with layer "
            "or group norm (for timm's ResNets model.image_encoder.param.norm_layer=groupnorm1)"
        )


def greeting(setup: Setup, plan: Plan, state: TrainState) -> str:
    """One line that says what is about to happen."""
    number = sum(row.count for row in state.parameters)
    start = f", from step {state.step}" if state.step else ""
    return (
        f"{setup.task_name}: {number / 1e6:.1f}M parameters, {setup.precision.name} on "
        f"{collectives.world()} × {setup.device.type}; {sum(map(len, plan.sources)):,} samples, "
        f"{plan.steps_per_epoch} steps × {plan.epochs} epochs of "
        f"{setup.config.data.batch_size}{start}"
    )


def evaluate(setup: Setup) -> None:
    """Score a checkpoint on every ``data.valid_name`` and labelled set, and print the table."""
    module, checkpoint = setup.trained_model()
    report_figures(setup, module, checkpoint.step, str(checkpoint.path))


def probe(setup: Setup) -> None:
    """Fit and score a linear probe on the tower of ``ckpt.resume`` or ``model.image_encoder``."""
    module, origin = setup.build_model(), setup.config.model.image_encoder.init
    if setup.config.ckpt.resume and setup.checkpoint is not None:
        origin, part = str(setup.checkpoint.path), "image_encoder"
        load_tower(getattr(module, part), setup.checkpoint.model(), part, key="ckpt.resume")
    report_figures(setup, module, None, origin)


def report_figures(setup: Setup, module: nn.Module, step: int | None, origin: str | None) -> None:
    """Print an evaluation's table, and add it to the run folder's ``evaluations.jsonl``."""
    metrics = setup.evaluate(module)
    save_predictions(setup, f"step_{step}" if step is not None else Path(origin or "model").stem)
    if collectives.rank() == 0 and metrics:
        Progress().row({"step": step or 0, **metrics})
        setup.run_dir.mkdir(parents=True, exist_ok=True)
        with (setup.run_dir / "evaluations.jsonl").open("a", encoding="utf8") as file:
            file.write(json.dumps({"step": step, "checkpoint": origin, **metrics}) + "\n")
