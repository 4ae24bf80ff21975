"""The modes of a run: train, evaluate, check. Each puts the parts together and sets them going."""

from __future__ import annotations

import json

from torch import nn

from engine import registry
from engine.config.dump import resolved_yaml
from engine.data.bad_samples import BadSamples
from engine.data.tar.damage import known_damage
from engine.data.text.choose import FOLDER as TOKENIZER_FOLDER
from engine.dist import collectives
from engine.logs.progress import Progress
from engine.logs.report import write_report
from engine.logs.run_log import open_log
from engine.models.parameters import format_table, parameter_table
from engine.models.towers import load_tower
from engine.setup import Setup
from engine.train import optim
from engine.train.checkpoint import CheckpointStore
from engine.train.loop import Training
from engine.train.plan import Plan, make_plan, order_key
from engine.train.state import TrainState, make_state


def train(setup: Setup) -> None:
    """Train to the end, or go on from where the run stopped."""
    config, rank = setup.config, collectives.rank()
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
    store = CheckpointStore(
        setup.run_dir / "checkpoints", config.ckpt.keep_last, writer=rank == 0
    )  # from here on the run writes: whatever is wrong with its configuration was said before
    if rank == 0:
        (setup.run_dir / "config.yaml").write_text(text, encoding="utf8")
        rows = parameter_table(state.module, state.optimizer.param_groups)
        (setup.run_dir / "parameters.txt").write_text(format_table(rows) + "\n", encoding="utf8")
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
        if any(group.train == "lora" for group in config.optim.groups):
            from engine.models.adapters import save_adapters

            save_adapters(state.module, setup.run_dir / "adapters", config.model.lora)
        write_report(setup.run_dir, gallery=setup.evaluate.gallery)


def build_state(setup: Setup, plan: Plan) -> TrainState:
    """The model, wrapped for the world it runs in, and its optimizer."""
    module = setup.build_model()
    module.train()
    optim.freeze(module, setup.config.optim)  # before the wrapper looks at what trains
    dist = setup.config.dist
    wrapped = registry.find("dist", dist.name, key="dist.name").build(module, dist, setup.device)
    return make_state(setup.config, module, wrapped, setup.precision, plan.total_steps)


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
    if collectives.rank() == 0 and metrics:
        Progress().row({"step": step or 0, **metrics})
        setup.run_dir.mkdir(parents=True, exist_ok=True)
        with (setup.run_dir / "evaluations.jsonl").open("a", encoding="utf8") as file:
            file.write(json.dumps({"step": step, "checkpoint": origin, **metrics}) + "\n")
