"""A run that is opened: its configuration with all that is made from it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from engine import registry
from engine.config.load import load
from engine.config.schema import Config
from engine.data.reader import Limits, limits_of
from engine.data.sources import open_dataset
from engine.data.text.tokenizer import FOLDER as TOKENIZER_FOLDER
from engine.data.text.tokenizer import TextTokenizer
from engine.data.text.tokenizer import choose as choose_tokenizer
from engine.data.text.tokenizer import load as load_tokenizer
from engine.data.transforms import pipeline
from engine.dist import collectives
from engine.errors import UserError
from engine.logs.progress import Progress
from engine.models.parameters import add_lora, add_token_rows
from engine.models.weights import load_model, load_tower
from engine.train.checkpoint import Checkpoint, CheckpointStore, open_checkpoint, step_of
from engine.train.precision import Precision
from engine.train.signals import StopRequest
from engine.types import Task


def warn_in_log(text: str) -> None:
    """A warning among the lines of a run's progress."""
    Progress().message(f"warning: {text}")


def warn_on_stderr(text: str) -> None:
    """A warning of a program whose output another one reads."""
    print(f"warning: {text}", file=sys.stderr)


@dataclass
class Run:
    """What a mode works on, and what another run's model is used by; parts are made when needed.

    A mode gets the run that the command line describes. ``Run.open`` opens one that was trained
    before, for its model to be used.
    """

    task_name: str
    config: Config
    device: torch.device
    stop: StopRequest = field(default_factory=StopRequest)
    warn: Callable[[str], None] = warn_in_log

    def __post_init__(self) -> None:
        """Record the task in the configuration. Raises UserError where another one is recorded."""
        recorded = self.config.task
        if not same_task(recorded, self.task_name) and self.task_class.trains:
            raise UserError(
                f"this is the configuration of a run of --task={recorded}, not of "
                f"--task={self.task_name}; give its own task, or task=null to use it for another",
                key="task",
            )
        self.config = self.config.model_copy(update={"task": self.task_name})

    @classmethod
    def open(
        cls,
        path: Path,
        task_name: str,
        *,
        key: str,
        device: str | torch.device | None = None,
        warn: Callable[[str], None] = warn_in_log,
    ) -> Run:
        """The run in a folder with its newest weights, or one of its checkpoints.

        Its ``model`` is on ``device`` (by default a GPU if there is one) in fp32. Raises UserError
        at ``key``.
        """
        if not is_run(path):
            what = "is not the folder of a run" if path.exists() else "does not exist"
            raise UserError(f"{path} {what}: there is no config.yaml in it", key=key)
        config = load(path / "config.yaml")
        if not same_task(config.task, task_name):
            raise UserError(f"{path} is a run of --task={config.task}; one of --task={task_name} "
                            "is needed", key=key)  # fmt: skip
        run = cls(task_name, config, torch.device("cpu"), warn=warn)
        homes = [path, *path.resolve().parents[1:2]]  # a run, or that of RUN/checkpoints/step_N
        folder = next((f for home in homes if (f := home / TOKENIZER_FOLDER).is_dir()), None)
        if folder is None:
            raise UserError(f"{path} has no tokenizer: it is not a run of --task={task_name}",
                            key=key)  # fmt: skip
        run.tokenizer = load_tokenizer(folder)
        try:
            model = run.task.build_model()
            add_adapters(model, run.config, run.task)
        except UserError as error:  # its key is one of that run's configuration, not of this one's
            why = f"{error.key}: {error}" if error.key else str(error)
            raise UserError(f"{path} is not a run of --task={task_name}: {why}", key=key) from error
        run.checkpoint = open_checkpoint(path, key=key, warn=warn)
        load_model(model, run.checkpoint.model(), key=key)
        run.device = find_device(device)
        run.model = model.to(run.device)
        return run

    @cached_property
    def run_dir(self) -> Path:
        """Where the run writes: ``ckpt.dir/data.exp_name``."""
        return Path(self.config.ckpt.dir) / (self.config.data.exp_name or self.task_name)

    @cached_property
    def precision(self) -> Precision:
        """Number formats, by ``dist.precision`` and the device."""
        return Precision.choose(self.config.dist, self.device)

    @property
    def limits(self) -> Limits:
        """What a sample to be evaluated may be at most."""
        return limits_of(self.config.data)

    def transform(self, split: Literal["train", "valid"]) -> pipeline.Pipeline:
        """The image transforms of a split."""
        return pipeline.for_split(self.config, split)

    # --- texts and task

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
            part = self.task_class.text_part or "text_encoder"
            state = choose_tokenizer(self.config, homes, lambda: self._captions(part), part).state()
        return TextTokenizer.from_state(collectives.broadcast_json(state))

    def _captions(self, part: str) -> Iterator[str]:
        """What a tokenizer is trained on."""
        data, key = self.config.data, f"model.{part}.tokenizer.datasets"
        chosen: list[str] = getattr(self.config.model, part).tokenizer.datasets
        if not chosen:
            chosen, key = data.train_name, "data.train_name"
        for name in chosen:
            yield from open_dataset(name, "train", data, key=key).captions()
        yield from self.task_class.more_texts(self.config)

    @cached_property
    def task_class(self) -> type[Task]:
        """The class that ``--task`` names."""
        found = registry.find("tasks", self.task_name).build
        if not (isinstance(found, type) and issubclass(found, Task)):
            raise UserError(
                f"task {self.task_name!r}: its 'build' must be a class that derives from "
                "engine.types.Task, and is not"
            )
        return found

    @cached_property
    def task(self) -> Task:
        """The task, with the tokenizer of its texts where it has any."""
        has_texts = self.task_class.text_part is not None
        tokenizer, options = self.tokenizer if has_texts else None, self.config.options
        return registry.build("tasks", self.task_name, self.config, tokenizer, options=options)

    # --- weights

    @cached_property
    def checkpoint(self) -> Checkpoint | None:
        """Where the run continues: ``ckpt.resume``, else the newest in the run's own folder."""
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
            is_file = path.is_file()
            found = Checkpoint(path, None) if is_file else Checkpoint.read(path, contents=False)
        return found

    def build_model(self, device: torch.device | None = None) -> nn.Module:
        """The task's model on the device, with the weights that the configuration names."""
        model = self.config.model
        torch.manual_seed(self.config.runner.seed)
        module = self.task.build_model()
        for part in ("image_encoder", "text_encoder"):
            if init := getattr(model, part).init:
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

    @property
    def trained(self) -> Checkpoint:
        """The checkpoint that there must be. Raises UserError."""
        if self.checkpoint is None:
            message = f"there is no checkpoint in {self.run_dir}: train first, or name one by "
            raise UserError(message + "ckpt.resume", key="ckpt.resume")
        return self.checkpoint

    @cached_property
    def model(self) -> nn.Module:
        """The model with the weights of the run's checkpoint. Raises UserError without one."""
        checkpoint = self.trained  # raises before anything is built
        module = self.build_model()
        load_model(module, checkpoint.model(), key="ckpt.resume")
        return module

    @property
    def origin(self) -> str:
        """Where the model's weights are from."""
        return str(self.trained.path)

    @property
    def step(self) -> int | None:
        """After how many steps they were saved; None where that is not known."""
        return self.trained.step


def same_task(recorded: str | None, task_name: str) -> bool:
    """Whether a configuration is of this task, as far as it says: older runs do not."""
    known = registry.names("tasks")
    return recorded is None or known.get(recorded, recorded) == known.get(task_name, task_name)


def is_run(path: Path) -> bool:
    """Whether a folder is a run's, or a checkpoint's."""
    return (path / "config.yaml").is_file()


def find_device(name: str | torch.device | None) -> torch.device:
    """The device of that name, by default a GPU if there is one. UserError where it is not here."""
    try:
        found = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        message = f"there is no device {str(name)!r} here; take cpu, or leave it out"
        raise UserError(message, key="device") from error
    return found


def add_adapters(model: nn.Module, config: Config, task: Task) -> None:
    """Give the model the adapters and rows of tokens that ``optim.groups`` asks for.

    Raises UserError without peft, and for tokens that the task's tokenizer has not.
    """
    groups, tokenizer = config.optim.groups, task.tokenizer
    add_token_rows(model, groups, tokenizer.token_id if tokenizer else lambda token: None)
    adapted = [group.pattern for group in groups if group.train == "lora"]
    if adapted:
        first = [group.train for group in groups].index("lora")
        add_lora(model, adapted, [group.pattern for group in groups[:first]], config.model.lora)
