"""A model is scored: its figures printed and kept, its predictions saved beside the run."""

from __future__ import annotations

import json
from pathlib import Path
from urllib.parse import quote

from engine.dist import collectives
from engine.evals.evaluation import Evaluations
from engine.logs.progress import Progress
from engine.logs.samples import FOLDER as SAMPLES_FOLDER
from engine.logs.samples import write_samples
from engine.models.weights import load_tower
from engine.run import Run


def score_model(run: Run, evaluations: Evaluations) -> None:
    """Print the figures of the run's model, and add them to the folder's ``evaluations.jsonl``.

    A task that has nothing to train takes the tower of ``ckpt.resume``, or its model as built.
    """
    step: int | None = None
    origin = run.config.model.image_encoder.init
    if run.task.trains:
        module = run.model
        step, origin = run.step, run.origin
    else:
        module = run.build_model()
        if run.config.ckpt.resume and run.checkpoint is not None:
            origin, part = run.origin, "image_encoder"
            load_tower(getattr(module, part), run.checkpoint.model(), part, key="ckpt.resume")
    metrics = evaluations(module)
    label = f"step_{step}" if step is not None else Path(origin or "model").stem
    save_predictions(run, evaluations, label)
    if collectives.rank() == 0 and metrics:
        Progress().row({"step": step or 0, **metrics})
        run.run_dir.mkdir(parents=True, exist_ok=True)
        with (run.run_dir / "evaluations.jsonl").open("a", encoding="utf8") as file:
            file.write(json.dumps({"step": step, "checkpoint": origin, **metrics}) + "\n")


def save_predictions(run: Run, evaluations: Evaluations, label: str) -> None:
    """What the latest evaluation generated, in the run folder's ``samples``."""
    if collectives.rank() != 0:
        return
    folder = run.run_dir / SAMPLES_FOLDER
    for dataset, result in evaluations.results:
        try:
            if result.predictions:
                rows = [prediction.to_json() for prediction in result.predictions]
                write_samples(folder, dataset, label, rows)
            if result.picture is not None:
                result.picture.save(folder / f"{quote(dataset, safe=' ')}.{label}.curve.png")
        except OSError as error:  # a full disk, say: the figures are worth more
            run.warn(f"predictions of {dataset} are not saved: {error}")
