"""A run's folder, opened for its trained model to be used."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from engine import registry
from engine.config.load import load
from engine.config.schema import Config
from engine.data.text.choose import FOLDER as TOKENIZER_FOLDER
from engine.data.text.tokenizer import load as load_tokenizer
from engine.data.transforms import pipeline
from engine.errors import UserError
from engine.models.token_rows import add_token_rows
from engine.train.checkpoint import load_model, open_checkpoint


class TrainedRun(NamedTuple):
    """What a run was, and what it came to; the model is on the CPU in fp32."""

    config: Config
    task: Any
    model: nn.Module
    transform: pipeline.Pipeline  # of images to be evaluated


def is_run(path: Path) -> bool:
    """Whether a folder is a run's, or a checkpoint's."""
    return (path / "config.yaml").is_file()


def open_run(path: Path, task_name: str, *, key: str, warn: Callable[[str], None]) -> TrainedRun:
    """The run in a folder with its newest weights, or one of its checkpoints. Raises UserError."""
    if not is_run(path):
        said = "is not the folder of a run" if path.exists() else "does not exist"
        raise UserError(f"{path} {said}: there is no config.yaml in it", key=key)
    config = load(path / "config.yaml")
    homes = [path, *path.resolve().parents[1:2]]  # a run, or that of RUN/checkpoints/step_N
    folder = next((f for home in homes if (f := home / TOKENIZER_FOLDER).is_dir()), None)
    if folder is None:
        raise UserError(f"{path} has no tokenizer: it is no run of --task={task_name}", key=key)
    tokenizer = load_tokenizer(folder)
    try:
        task = registry.find("tasks", task_name).build(config, lambda: tokenizer)
        model = task.build_model()
        add_adapters(model, config, task)
    except UserError as error:  # its key is one of the run's configuration, not of this one's
        why = f"{error.key}: {error}" if error.key else str(error)
        raise UserError(f"{path} is no run of --task={task_name}: {why}", key=key) from error
    load_model(model, open_checkpoint(path, key=key, warn=warn).model(), key=key)
    names, form = config.transforms.valid_transforms, config.transforms
    transform = pipeline.build(names, form, "transforms.valid_transforms", config.data.decoder)
    return TrainedRun(config, task, model, transform)


def find_device(name: str | torch.device | None) -> torch.device:
    """The device of that name, by default a GPU if there is one. UserError where it is not here."""
    try:
        found = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(
            f"there is no device {str(name)!r} here; take cpu, or leave it out", key="device"
        ) from error
    return found


def add_adapters(model: nn.Module, config: Config, task: Any = None) -> None:
    """Give the model the adapters and rows of tokens that ``optim.groups`` asks for.

    Raises UserError without peft, and for tokens that the task's tokenizer has not.
    """
    groups = config.optim.groups
    tokenizer: Any = getattr(task, "tokenizer", None)
    add_token_rows(model, groups, tokenizer.token_id if tokenizer else lambda token: None)
    adapted = [group.pattern for group in groups if group.train == "lora"]
    if not adapted:
        return
    try:
        from engine.models.adapters import add_lora  # peft takes a while to import
    except ImportError as error:
        raise UserError(
            f"train: lora needs peft ({error}): pip install -e .[caption]", key="optim.groups"
        ) from error
    first = [group.train for group in groups].index("lora")
    add_lora(model, adapted, [group.pattern for group in groups[:first]], config.model.lora)
