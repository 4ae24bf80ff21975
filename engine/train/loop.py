"""The training loop: batches in, steps, rows out, checkpoints and evaluations between.

Data flows one way: loader → task.batch → step → update → logs. Everything random depends on
(seed, step, rank), so that a run stopped anywhere continues bit for bit where it was.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine import registry
from engine.config.schema import Config
from engine.data import loader
from engine.data.bad_samples import BadRecord, BadSamples
from engine.data.reader import limits_of
from engine.data.stream.loader import StreamLoader
from engine.data.transforms import pipeline
from engine.dist import collectives
from engine.errors import FaultError
from engine.logs.run_log import RunLog
from engine.train.checkpoint import CheckpointStore
from engine.train.plan import Plan, order_key
from engine.train.signals import StopRequest
from engine.train.state import TrainState
from engine.types import Batch, Metrics, Task


@dataclass
class Training:
    """One run of the loop: what it reads, updates, writes and calls."""

    config: Config
    config_text: str
    task: Task
    plan: Plan
    state: TrainState
    store: CheckpointStore
    bad: BadSamples
    log: RunLog
    stop: StopRequest
    device: torch.device
    evaluate: Callable[[], Metrics]
    best_metric: Callable[[Metrics], float | None]  # what decides which checkpoint is the best
    stream: StreamLoader | None = None  # of streamed sources, while the loop runs

    def run(self) -> Metrics:
        """Train to the end of the plan, or until asked to stop; returns the last evaluation.

        All that is saved is on the disk on return. Raises FaultError where a save has failed.
        """
        state, plan, clock = self.state, self.plan, time.perf_counter
        metrics: Metrics = {}
        gradients = self._build_step()
        begin = clock()
        for step, batch, bad in self._batches():
            loaded = clock()
            batch["step"] = step
            losses = gradients(batch, step)
            facts = self._agree(step, losses["loss"], batch, bad) | {"lr": state.set_lr()}
            self._update(step, batch, facts)
            state.step = step + 1
            self._row(losses, facts, loaded - begin, clock() - begin)
            ended = state.step % plan.steps_per_epoch == 0
            if ended and not facts["stop"] and self._evaluation_is_due():
                metrics = self._evaluate()
            if ended or state.step % self.config.ckpt.step_interval == 0 or facts["stop"]:
                self.save(metrics if ended else {})
            if facts["stop"]:
                break
            begin = clock()
        self.store.wait()
        return metrics

    def _build_step(self) -> Callable[[Batch, int], dict[str, Tensor]]:
        config, state = self.config, self.state
        parts = {"task": self.task, "model": state.parallel, "precision": state.precision}
        return registry.build(
            "train/steps", config.runner.name, config.runner, config.data, **parts,
            device=self.device, key="runner.name", options=config.options,
        )  # fmt: skip

    def _batches(self) -> Iterator[loader.Loaded]:
        data, plan = self.config.data, self.plan
        transform = pipeline.for_split(self.config, "train")
        options: dict[str, Any] = {
            "first_step": self.state.step,
            "total_steps": plan.total_steps,
            "rank": collectives.rank(),
            "world": collectives.world(),
            "seed": self.config.runner.seed,
            "num_workers": data.num_workers,
            "pin": self.device.type == "cuda",
            "limits": limits_of(data, self.task),
        }
        if plan.streamed:
            self.stream = StreamLoader(
                plan.streamed,
                transform,
                self.task.batch,
                batch_size=data.batch_size // collectives.world(),
                saved=self.state.stream,
                **options,
            )
            self.log.message(self.stream.greeting)
            return iter(self.stream)
        assert plan.sampler is not None  # streams alone have none
        return loader.train_batches(
            plan.sources,
            plan.sampler,
            transform,
            self.task.batch,
            steps_per_epoch=plan.steps_per_epoch,
            blank=self.task.blank,
            **options,
        )

    def _agree(
        self, step: int, loss: Tensor, batch: Batch, bad: Sequence[BadRecord]
    ) -> dict[str, Any]:
        """What all ranks must know alike before the update, in one small message."""
        ranks = collectives.all_gather_json(
            {
                "loss": float(loss),  # waits for the device: nothing may be updated on a NaN
                "rows": 0 if batch.get("blank") else len(batch["index_B"]),
                "stop": self.stop.requested,
                "bad": [record.to_json() for record in bad],
            }
        )
        records = [record for rank in ranks for record in rank["bad"]]
        rows = sum(rank["rows"] for rank in ranks)
        epoch_end = (step + 1) % self.plan.steps_per_epoch == 0
        self.bad.add(records, seen=rows + len(records), epoch_end=epoch_end)
        return {
            "loss": sum(rank["loss"] for rank in ranks) / len(ranks),
            "rows": rows,
            "stop": any(rank["stop"] for rank in ranks),
        }

    def _update(self, step: int, batch: Batch, facts: dict[str, Any]) -> None:
        """Clip and step; on a loss or gradient that is not finite, stop or skip as configured."""
        facts["grad_norm"] = norm = self.state.clip()
        # A gradient scaler probes for the largest scale, so that overflows are expected.
        if math.isfinite(facts["loss"]) and (
            math.isfinite(norm) or self.state.parallel.scales_loss
        ):
            self.state.parallel.update()
            return
        what = f"loss {facts['loss']}, gradient norm {norm}"
        if self.config.runner.on_nonfinite == "stop":
            raise FaultError(self._nonfinite(step, batch, what))
        self.state.skip()
        self.log.message(f"step {step}: {what}; skipped, {self.state.skipped} so far")

    def _nonfinite(self, step: int, batch: Batch, what: str) -> str:
        """What to do, and the step's samples; their names are written to a file."""
        if self.plan.streamed:  # each rank knows its own rows alone
            mine = torch.stack((batch["dataset_B"], batch["index_B"]), dim=1).tolist()
            rows = [row for rank in collectives.all_gather_json(mine) for row in rank]
        else:
            rows = self.plan.rows(step).tolist()
        names = [self.plan.name(dataset, row) for dataset, row in rows]
        path = Path(self.store.folder).parent / f"nonfinite_step_{step}.json"
        if collectives.rank() == 0:
            path.write_text(json.dumps(names, indent=0), encoding="utf8")
        self.store.settle()
        saved = self.store.steps()
        good = f"{self.store.folder}/step_{saved[-1]}" if saved else "none yet"
        return (
            f"{what} at step {step}; nothing was updated. Last good checkpoint: {good}\n"
            f"samples of the step ({len(names)}, all in {path}): {', '.join(names[:5])} …\n"
            "lower optim.lr.init, set optim.grad_clip, take dist.precision=fp32, or set "
            "runner.on_nonfinite=skip to leave such steps out"
        )

    def _row(
        self, losses: dict[str, Tensor], facts: dict[str, Any], waited: float, seconds: float
    ) -> None:
        step, seconds = self.state.step, max(seconds, 1e-9)
        self.state.seen += facts["rows"]
        self.log.row(
            {
                "step": step,
                "epoch": step / self.plan.steps_per_epoch,
                "loss": facts["loss"],
                "lr": facts["lr"],
                "grad_norm": facts["grad_norm"],
                "samples_per_second": facts["rows"] / seconds,
                "data_wait": waited / seconds,
                "samples_seen": self.state.seen,
                "bad_samples": self.bad.total,
                **{name: float(value) for name, value in losses.items() if name != "loss"},
            }
        )

    def _evaluation_is_due(self) -> bool:
        """After the epoch that has just ended."""
        interval = self.config.eval.epoch_interval
        epoch = self.state.step // self.plan.steps_per_epoch
        return interval is not None and (epoch % interval == 0 or epoch == self.plan.epochs)

    def _evaluate(self) -> Metrics:
        self.store.wait()  # evaluation starts processes, which a fork in mid-write could upset
        metrics = self.evaluate()
        if metrics:
            self.log.row({"step": self.state.step, **metrics})
        return metrics

    def save(self, metrics: Metrics) -> None:
        """Start to write a checkpoint (every rank must call it; rank 0 writes)."""
        if self.stream is not None:
            self.state.stream = collectives.all_gather_json(self.stream.state())
        state = self.state.capture(order_key(self.config, self.plan))
        self.store.save(
            self.state.step,
            model=self.state.parallel.weights(),
            state=state,
            config_text=self.config_text,
            metric=self.best_metric(metrics),
            copy=not self.state.parallel.copies,
        )
