"""What an evaluation is, and all that a configuration asks for, as one table of figures.

Each evaluation is a file of this folder, or a module that ``eval.extra`` names. It defines

    MODALITIES       those that a task must have for the evaluation to apply; optional
    Options          of a module from outside: its section of ``options``; optional
    build(run)       the ``Evaluation``; with ``options=`` where there are any
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

import numpy as np
from PIL import Image
from torch import nn

from engine import registry
from engine.data.bad_samples import BadRecord, summary
from engine.data.decode import decode
from engine.data.image_files import read_image
from engine.data.sources import open_source
from engine.dist import collectives
from engine.evals.inputs import Inputs, open_folder
from engine.evals.predict import Predictor
from engine.logs import samples
from engine.logs.gallery import SIDE, Example
from engine.logs.progress import Progress
from engine.models.weights import load_tower
from engine.run import Run
from engine.types import BadSample, Metrics, Source


@dataclass
class Result:
    """What an evaluation of one dataset found; equal on every rank."""

    metrics: dict[str, float | str]
    bad: list[BadRecord]  # rows left out
    predictions: Sequence[Any] = ()  # in the order of rows; each has ``to_json``
    examples: Sequence[Example] = ()  # to look at
    picture: Image.Image | None = None  # saved beside the predictions


class Evaluation:
    """One kind of evaluation, of as many datasets as the configuration names for it."""

    order = 0  # those of a higher number run later, equal ones in the order of their files' names
    curves: Sequence[str] = ()  # figures that the report draws over the steps, beside ``best``

    def __init__(self, run: Run) -> None:
        self.run, self.config = run, run.config

    @property
    def best(self) -> str | None:
        """The figure by which a checkpoint is the best, where ``ckpt.best_metric`` is null."""
        return None

    def datasets(self) -> Sequence[str]:
        """The names that its figures stand under; none where nothing is asked of it."""
        return self.config.data.valid_name

    def check(self) -> None:
        """Open all that is needed: a user error is reported before training, not after it."""
        for name in self.datasets():
            self.open(name)

    def evaluate(self, dataset: str, model: Predictor) -> Result:
        """The figures of one of ``datasets``; every rank takes part and gets the same."""
        return self.score(model, self.open(dataset))

    def score(self, model: Predictor, source: Source) -> Result:
        """The figures of a validation set."""
        raise NotImplementedError

    @property
    def num_rows(self) -> int | None:
        """Rows of each validation set; None: all."""
        data = self.config.data
        return data.valid_steps * data.batch_size_val if data.valid_steps else None

    def open(
        self, name: str, split: Literal["train", "valid"] = "valid", *, key: str = "data.valid_name"
    ) -> Source:
        """The dataset called ``name``, which ``key`` names. Raises UserError."""
        return open_source(name, split, self.config.data, key=key)

    def thumbnail(self, source: Source, row: int) -> Image.Image:
        """The first image of a row, upright and RGB, its longer side SIDE at most; grey where it
        cannot be shown."""
        try:
            images, most = source[row].images, self.config.data.max_image_pixels
            data = read_image(images[0]) if images else b""
            small = decode(data, max_pixels=most, target=(SIDE, SIDE)).copy()
        except BadSample:
            return Image.new("RGB", (SIDE, SIDE), "grey")
        small.thumbnail((SIDE, SIDE))
        return small


class Generation(Evaluation):
    """An evaluation of what a model generates: --mode=generate does it with a user's own inputs."""

    name = "captions"  # of what is generated: of its folder and files
    title = "Captions of"  # the inputs
    unit = "image"  # an input
    results_file: str | None = None  # in the official form

    @property
    def num_examples(self) -> int:
        """Predictions of a validation set that are shown."""
        return self.config.eval.captions.num_examples

    def evaluate(self, dataset: str, model: Predictor) -> Result:
        """The figures, and the first few predictions to look at."""
        source = self.open(dataset)
        found = self.score(model, source)
        shown = found.predictions[: self.num_examples]
        found.examples = [self.example(source, one) for one in shown]
        return found

    def inputs(self) -> Inputs:
        """What ``generate.input`` names. Raises UserError, also for what cannot be generated."""
        return open_folder(self.config.generate.input)

    def predict(
        self, model: Predictor, source: Source, rows: np.ndarray
    ) -> tuple[Sequence[Any], list[BadRecord]]:
        """A prediction for each row, in their order and on every rank, and the bad rows."""
        raise NotImplementedError

    def example(self, source: Source, prediction: Any) -> Example:
        """A prediction to look at."""
        raise NotImplementedError

    def more_files(
        self, folder: Path, model: Predictor, source: Source, predictions: Sequence[Any]
    ) -> str:
        """Write what else is asked for; returns what to say of it."""
        return ""


class Evaluations:
    """All evaluations of a run that apply to its task. Raises UserError."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.results: list[tuple[str, Result]] = []  # of the latest call, by dataset
        known = set(run.task.modalities)
        needed = registry.declared("evals", "MODALITIES")
        names = [name for name in needed if known >= set(needed[name])]  # else not imported
        found = [registry.find("evals", name).build(run) for name in names]
        self.parts: list[Evaluation] = sorted(found, key=lambda part: part.order)
        for place, name in enumerate(run.config.eval.extra):
            module = registry.find("evals", name, key=f"eval.extra.{place}")
            if known >= set(getattr(module, "MODALITIES", ())):
                options = registry.options_of(module, run.config.options)
                self.parts.append(module.build(run, **options))

    def __call__(self, model: nn.Module) -> Metrics:
        """``DATASET/metric`` → value, in percent; nothing where it was stopped on the way.

        Every rank takes part and gets the same figures.
        """
        found: dict[str, float | str] = {}
        self.results = []
        predictor = Predictor.of_run(self.run, model)
        for part in self.parts:
            for name in part.datasets():
                if collectives.any_true(self.run.stop.requested):
                    self.results = []
                    return {}
                result = part.evaluate(name, predictor)
                if result.bad and collectives.rank() == 0:
                    self.run.warn(f"{name}: {len(result.bad)} rows left out: {summary(result.bad)}")
                self.results.append((name, result))
                found |= {f"{name}/{metric}": value for metric, value in result.metrics.items()}
        return found

    def check(self) -> None:
        """Whatever cannot be evaluated is reported before training, not after it. UserError."""
        for part in self.parts:
            if part.datasets():
                part.check()

    def score_run(self) -> None:
        """Print the figures of the run's model, and add them to its ``evaluations.jsonl``.

        A task that has nothing to train takes the tower of ``ckpt.resume``, or its model as built.
        """
        run = self.run
        step, origin = None, run.config.model.image_encoder.init
        if run.task.trains:
            module, step, origin = run.model, run.step, run.origin
        else:
            module = run.build_model()
            if run.config.ckpt.resume and run.checkpoint is not None:
                origin, part = run.origin, "image_encoder"
                load_tower(getattr(module, part), run.checkpoint.model(), part, key="ckpt.resume")
        metrics = self(module)
        self.save(f"step_{step}" if step is not None else Path(origin or "model").stem)
        if collectives.rank() == 0 and metrics:
            Progress().row({"step": step or 0, **metrics})
            run.run_dir.mkdir(parents=True, exist_ok=True)
            with (run.run_dir / "evaluations.jsonl").open("a", encoding="utf8") as file:
                file.write(json.dumps({"step": step, "checkpoint": origin, **metrics}) + "\n")

    def save(self, label: str) -> None:
        """What the latest call generated, in the run folder's ``samples``."""
        folder = self.run.run_dir / samples.FOLDER
        for dataset, result in self.results if collectives.rank() == 0 else ():
            try:
                if result.predictions:
                    rows = [prediction.to_json() for prediction in result.predictions]
                    samples.write_samples(folder, dataset, label, rows)
                if result.picture is not None:
                    result.picture.save(folder / f"{quote(dataset, safe=' ')}.{label}.curve.png")
            except OSError as error:  # a full disk, say: the figures are worth more
                self.run.warn(f"predictions of {dataset} are not saved: {error}")

    @property
    def generation(self) -> Generation | None:
        """What --mode=generate does with the task; None where it generates nothing."""
        return next((part for part in self.parts if isinstance(part, Generation)), None)

    @property
    def galleries(self) -> dict[str, Sequence[Example]]:
        """Examples of the latest call, by dataset."""
        return {name: result.examples for name, result in self.results if result.examples}

    @property
    def headlines(self) -> list[str]:
        """The figures that decide, by name: ``RSUM``."""
        return list(dict.fromkeys(part.best for part in self.parts if part.best is not None))

    def best_metric(self, metrics: Metrics) -> float | None:
        """The figure that decides which checkpoint is the best; None where there is none."""
        return best_metric(metrics, self.run.config.ckpt.best_metric, self.headlines)

    @property
    def curves(self) -> list[str]:
        """The figures that a report draws over the steps."""
        more = [name for part in self.parts for name in part.curves]
        return list(dict.fromkeys([*self.headlines, *more]))


def rows_of_images(source: Source, number: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Codes of all rows' images, and the first row of each of the first ``number`` images."""
    codes = np.asarray(source.column("image_id"))
    return codes, np.sort(np.unique(codes, return_index=True)[1])[:number]


def json_line(required: dict[str, Any], **optional: Any) -> dict[str, Any]:
    """A line of a predictions file, without those of ``optional`` that are empty."""
    return required | {
        name: value for name, value in optional.items() if value not in (None, "", [])
    }


def best_metric(metrics: Metrics, name: str | None, usual: Sequence[str] = ()) -> float | None:
    """The figure called ``name`` (``DATASET/FIGURE``, or FIGURE of the first dataset that has it),
    without a name the first of those that are ``usual``; None where there is none."""
    figures = {key: value for key, value in metrics.items() if isinstance(value, int | float)}
    if name in figures:
        return figures[name]
    if name is not None:
        return next((v for key, v in figures.items() if key.endswith(f"/{name}")), None)
    for wanted in usual:
        for key, value in figures.items():
            if key.partition("/")[2] == wanted:
                return value
    return None


def missing_metric(metrics: Metrics, name: str | None) -> str | None:
    """What to say of an evaluation that has not the figure that ``ckpt.best_metric`` names."""
    if name is None or not metrics or best_metric(metrics, name) is not None:
        return None
    known = [key for key, value in metrics.items() if isinstance(value, int | float)]
    return (
        f"warning: ckpt.best_metric: no figure of the evaluation is called {name!r}, so that no "
        f"checkpoint is the best; there are {', '.join(known[:8])}{' …' if len(known) > 8 else ''}"
    )
