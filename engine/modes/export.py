"""``--mode=export``: a run's weights in a form that other programs read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from engine import registry
from engine.dist import collectives
from engine.logs.progress import Progress
from engine.models.parameters import merge
from engine.run import Run


def run(run: Run) -> None:
    """Write ``export.output`` with the run's checkpoint, in ``export.format``. Raises UserError."""
    section = run.config.export
    form = registry.find("export", section.format, key="export.format")
    options = registry.options_of(form, run.config.options)
    runner = run.config.runner.model_copy(update={"compile": False})
    plain = replace(run, config=run.config.model_copy(update={"runner": runner}))
    model = plain.model
    if collectives.rank() != 0:
        return
    merge(model)
    plain.model = model.cpu().float().eval().requires_grad_(False)
    name = section.format.rpartition(".")[2]
    folder = Path(section.output) if section.output else run.run_dir / "export" / name
    form.build(plain, folder, section, "export.output", **options)
    Progress().message(f"{section.format}: {folder}")
