"""What every mode starts from: the run's folder, tokenizer, task, model and evaluations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from engine import registry
from engine.config.schema import Config
from engine.data.reader import Limits
from engine.data.sources import open_source
from engine.data.text.choose import choose_tokenizer
from engine.data.text.tokenizer import TextTokenizer
from engine.dist import collectives
from engine.errors import UserError
from engine.evals.run import Evaluations
from engine.logs.progress import Progress
from engine.models.weights import load_tower
from engine.train.checkpoint import Checkpoint, CheckpointStore, load_model, open_checkpoint
from engine.train.checkpoint_folder import step_of
from engine.train.precision import Precision
from engine.train.signals import StopRequest
from engine.train.trained_run import add_adapters


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
        if self.config.model.init:  # whose weights know its ids
            path = Path(self.config.model.init).expanduser()
            homes.append(path.parents[1] if step_of(path) is not None else path)
        state = None
        if collectives.rank() == 0:
            part = getattr(registry.find("tasks", self.task_name), "TEXT_PART", "text_encoder")
            state = choose_tokenizer(self.config, homes, lambda: self._captions(part), part).state()
        return TextTokenizer.from_state(collectives.broadcast_json(state))

    def _captions(self, part: str) -> Iterator[str]:
        data, key = self.config.data, f"model.{part}.tokenizer.datasets"
        chosen: list[str] = getattr(self.config.model, part).tokenizer.datasets
        if not chosen:
            chosen, key = data.train_name, "data.train_name"
        for name in chosen:
            yield from open_source(name, "train", data, key=key).captions()
        more = getattr(registry.find("tasks", self.task_name), "more_texts", None)
        yield from more(self.config) if more else ()

    @cached_property
    def task(self) -> Any:
        # a task without texts never asks for the tokenizer, and none is made
        return registry.find("tasks", self.task_name).build(self.config, lambda: self.tokenizer)

    def build_model(self, device: torch.device | None = None) -> nn.Module:
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
        add_adapters(module, self.config, self.task)
        if self.config.runner.compile:
            module.compile(dynamic=True)
        return module.to(device or self.device, self.precision.weights)

    def trained_model(self) -> tuple[nn.Module, Checkpoint]:
        """The model with the weights of the run's checkpoint. UserError where it has none."""
        checkpoint = self.checkpoint
        if checkpoint is None:
            raise UserError(
                f"there is no checkpoint in {self.run_dir}: train first, or name one by "
                "ckpt.resume",
                key="ckpt.resume",
            )
        module = self.build_model()
        load_model(module, checkpoint.model(), key="ckpt.resume")
        return module, checkpoint

    @cached_property
    def evaluate(self) -> Evaluations:
        """A function of a module that gives its figures."""
        return Evaluations(
            self.config,
            self.task,
            self.device,
            self.precision.autocast,
            self.warn if collectives.rank() == 0 else lambda text: None,
            probe_optimizer=self._probe_optimizer(),
            stopped=lambda: collectives.any_true(self.stop.requested),
            open_judge=self._open_judge,
        )

    def _probe_optimizer(self) -> Any:
        if self.config.eval.linear_probe.method != "lars":
            return None
        from engine.train.lars import LARS  # with timm, which takes a while to import

        return LARS

    def _open_judge(self, name: str, key: str) -> Any:
        from engine.ranking import open_contrast

        return open_contrast(
            name,
            key=key,
            device=self.device,
            batch_size=self.config.data.batch_size_val,
            num_workers=self.config.data.num_workers,
            autocast=self.precision.autocast,
            warn=self.warn,
            limits=Limits(self.config.data.max_image_pixels, self.config.data.max_caption_chars),
        )
