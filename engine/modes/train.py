"""``--mode=train``: train to the end, or continue where the run stopped."""

from __future__ import annotations

from torch import nn

from engine.config.dump import resolved_yaml
from engine.data.bad_samples import BadSamples
from engine.data.tables.source import damage_report
from engine.data.text.tokenizer import FOLDER as TOKENIZER_FOLDER
from engine.dist import collectives
from engine.evals.evaluation import Evaluations, missing_metric
from engine.logs.report import write_report
from engine.logs.run_log import RunLog, open_log
from engine.models.parameters import format_table, save_adapters
from engine.modes.state import build_state, check_dist
from engine.run import Run
from engine.train.checkpoint import CheckpointStore
from engine.train.loop import Training
from engine.train.plan import Plan, make_plan, order_key
from engine.train.state import TrainState
from engine.types import Metrics


def run(run: Run) -> None:
    """Train as the configuration says; a task without a loss is only scored."""
    run.stop.saves = True
    config, rank = run.config, collectives.rank()
    if run.task_class.trains:
        check_dist(run)  # before the task reads data, for its tokenizer
    evaluations = Evaluations(run)
    if not run.task.trains:
        evaluations.score_run()
        return
    plan = make_plan(config, collectives.world())
    for damage in (text for source in plan.sources for text in damage_report(source)):
        if rank == 0:
            run.warn(damage)
    if config.eval.epoch_interval is not None:
        evaluations.check()
    checkpoint, text = run.checkpoint, resolved_yaml(config)
    state = build_state(run, plan.total_steps)
    if rank == 0:
        warn_of_mixed_statistics(run, state.module)
    if checkpoint is not None:
        state.restore(checkpoint, order_key(config, plan))
    store = begin(run, state, text)  # what is wrong with the configuration was reported before
    bad = BadSamples(run.run_dir / "bad_samples.jsonl", config.data.max_bad_fraction,
                     write=rank == 0)  # fmt: skip
    with open_log(
        config, run.run_dir, rank=rank, total_steps=plan.total_steps, resume_step=state.step
    ) as log:
        log.message(greeting(run, plan, state))
        training = Training(
            config, text, run.task, plan, state, store, bad, log, run.stop, run.device,
            evaluate=lambda: evaluate(run, evaluations, state, log),
            best_metric=evaluations.best_metric,
        )  # fmt: skip
        with store:  # what ends the run does not hide a save that failed
            metrics = training.run()
        if run.stop.requested:
            log.message(
                f"{run.stop.name}: saved at step {state.step} of {plan.total_steps}; "
                "the same command continues from there"
            )
        elif not metrics and config.eval.epoch_interval is not None:  # nothing was left to train
            log.row({"step": state.step, **evaluate(run, evaluations, state, log)})
        if bad.total:
            log.message(bad.describe())
        log.message(f"run folder: {run.run_dir}")
    end(run, evaluations, state)


def begin(run: Run, state: TrainState, text: str) -> CheckpointStore:
    """From here on the run writes: what it was made with, and the place of its checkpoints."""
    run_dir, rank = run.run_dir, collectives.rank()
    store = CheckpointStore(run_dir / "checkpoints", run.config.ckpt.keep_last, writer=rank == 0)
    if rank == 0:
        (run_dir / "config.yaml").write_text(text, encoding="utf8")
        table = format_table(state.parameters)
        (run_dir / "parameters.txt").write_text(table + "\n", encoding="utf8")
        run.tokenizer.save(run_dir / TOKENIZER_FOLDER)
    return store


def end(run: Run, evaluations: Evaluations, state: TrainState) -> None:
    """Write the adapters on their own, and the report."""
    config, rank = run.config, collectives.rank()
    if any(group.train == "lora" for group in config.optim.groups):
        weights = state.parallel.weights()
        if rank == 0:
            save_adapters(state.module, run.run_dir / "adapters", config.model.lora, weights)
    if rank == 0:
        write_report(
            run.run_dir, galleries=evaluations.galleries, curves=evaluations.curves,
            headlines=evaluations.headlines,
        )  # fmt: skip


def evaluate(run: Run, evaluations: Evaluations, state: TrainState, log: RunLog) -> Metrics:
    """The figures of the model as it is; its predictions and examples are saved."""
    with state.parallel.whole():
        metrics = evaluations(state.module)
    evaluations.save(f"step_{state.step}")
    for dataset, examples in evaluations.galleries.items():
        log.examples(state.step, dataset, examples)
    if missing := missing_metric(metrics, run.config.ckpt.best_metric):
        log.message(missing)
    return metrics


def warn_of_mixed_statistics(run: Run, module: nn.Module) -> None:
    """Warn of batch norm where each batch is of one source."""
    data = run.config.data
    norms = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in module.modules())
    if norms and data.train_type == "debias" and len(data.train_name) > 1:
        run.warn(
            "data.train_type debias gives batch norm one source at a time, while evaluation uses "
            "the statistics of all sources mixed: scores may collapse. Take an encoder with layer "
            "or group norm (for timm's ResNets model.image_encoder.param.norm_layer=groupnorm1)"
        )


def greeting(run: Run, plan: Plan, state: TrainState) -> str:
    """One line that says what is about to happen."""
    number = sum(row.count for row in state.parameters)
    start = f", from step {state.step}" if state.step else ""
    return (
        f"{run.task_name}: {number / 1e6:.1f}M parameters, {run.precision.name} on "
        f"{collectives.world()} × {run.device.type}; {sum(map(len, plan.datasets)):,} samples, "
        f"{plan.steps_per_epoch} steps × {plan.epochs} epochs of "
        f"{run.config.data.batch_size}{start}"
    )
