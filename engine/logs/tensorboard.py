"""TensorBoard event files in the run's folder."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.tensorboard.writer import SummaryWriter

from engine.logs.gallery import Example, markdown, sheet


class TensorBoard:
    """Every number of a row becomes a scalar at the row's step.

    Steps after ``resume_step`` that a lost future had written are purged from the curves.
    """

    def __init__(self, run_dir: Path, resume_step: int = 0) -> None:
        purge = resume_step + 1 if resume_step else None
        self._writer = SummaryWriter(str(run_dir), purge_step=purge, flush_secs=30)

    def row(self, row: dict[str, Any]) -> None:
        """Queue a row; the writer's own thread puts it into the file."""
        step = row.get("step", 0)
        for name, value in row.items():
            if name not in ("step", "epoch") and isinstance(value, int | float):
                # TensorBoard groups by what stands before the slash.
                tag = name if "/" in name else f"train/{name}"
                self._writer.add_scalar(tag, value, step)

    def examples(self, step: int, dataset: str, examples: Sequence[Example]) -> None:
        """A sheet of the images, and under the same name a table of their texts."""
        tag = f"{dataset}/examples"
        self._writer.add_image(tag, np.asarray(sheet(examples)), step, dataformats="HWC")
        self._writer.add_text(tag, markdown(examples), step)

    def close(self) -> None:
        """Write what is queued."""
        self._writer.close()
