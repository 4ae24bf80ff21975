"""``--mode=export``: a run's weights in a form that other programs read."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from engine import registry
from engine.config.schema import Config
from engine.dist import collectives
from engine.export.trained import Trained
from engine.logs.progress import Progress
from engine.models.parameters import is_adapter
from engine.setup import Setup


def export(setup: Setup) -> None:
    """Write ``export.output`` with the run's checkpoint, in ``export.format``. Raises UserError."""
    section = setup.config.export
    form = registry.find("export", section.format, key="export.format")
    plain = Setup(setup.task_name, _plain(setup.config), setup.device, setup.stop, setup.warn)
    model, checkpoint = plain.trained_model()
    if collectives.rank() != 0:
        return
    model = _merged(model).cpu().float().eval().requires_grad_(False)
    trained = Trained(
        setup.task_name, plain.config, plain.task, model, str(checkpoint.path), checkpoint.step
    )
    name = section.format.rpartition(".")[2]
    folder = Path(section.output) if section.output else setup.run_dir / "export" / name
    form.build(trained, folder, section, "export.output")
    Progress().message(f"{section.format}: {folder}")


def _plain(config: Config) -> Config:
    """The run's configuration without what is for training alone."""
    runner = config.runner.model_copy(update={"compile": False})
    return config.model_copy(update={"runner": runner})


def _merged(model: nn.Module) -> nn.Module:
    """Adapters put into the weights they are for."""
    if any(is_adapter(name) for name, _ in model.named_parameters()):
        from engine.models.adapters import merge  # with peft, which takes a while to import

        merge(model)
    return model
