"""``--mode=generate``: captions for a folder of images, as JSON lines and as a page to look at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engine.data.bad_samples import BadSamples, summary
from engine.dist import collectives
from engine.errors import UserError
from engine.evals.captions import speak
from engine.evals.gallery import spoken
from engine.evals.input_images import Folder, open_folder
from engine.evals.predictions import Prediction
from engine.logs.progress import Progress
from engine.logs.report import write_gallery
from engine.logs.samples import lines, make_writable, results, write_whole
from engine.setup import Setup

BAD = "bad_samples.jsonl"
_NUM_SHOWN = 200  # images on the page


def generate(setup: Setup) -> None:
    """Caption ``generate.input`` with the run's checkpoint. Raises UserError."""
    if "caption" not in setup.task.modalities:
        raise UserError(
            f"--mode=generate speaks about images, which --task={setup.task_name} does not learn; "
            "take --task=caption"
        )
    section = setup.config.generate
    source = open_folder(section.input)
    folder = Path(section.output) if section.output else setup.run_dir / "captions"
    module, _ = setup.trained_model()
    if collectives.rank() == 0:
        _prepare(folder)
        for closed in source.closed:
            setup.warn(f"left out: {closed}")
    evaluations = setup.evaluate
    predictions, bad = speak(
        evaluations.encoder(module),
        source,
        np.arange(len(source)),
        section,
        setup.config.data.prompt.instruction,
        evaluations.judge("ranker"),
    )
    if not predictions:
        raise UserError(
            f"none of the {len(source)} images in {source.root} can be read: {summary(bad)}",
            key="generate.input",
        )
    if collectives.rank() != 0:
        return
    (folder / BAD).unlink(missing_ok=True)
    if bad:
        BadSamples(folder / BAD, 1.0).add(bad, seen=len(source))
        setup.warn(f"{_number(bad, 'image')} left out: {summary(bad)}")
    write(folder, source, predictions, setup.config.data.max_image_pixels)
    Progress().message(
        f"{_number(predictions, 'caption')}: {folder / 'captions.jsonl'}, "
        f"{folder / 'captions.html'}"
    )


def _number(things: Sequence[Any], name: str) -> str:
    return f"{len(things):,} {name}{'s' if len(things) != 1 else ''}"


def _prepare(folder: Path) -> None:
    """Make the folder that is written to, before hours of work are done for it. UserError."""
    try:
        make_writable(folder)
    except OSError as error:
        raise UserError(
            f"no captions can be written to {folder}: {error.strerror}", key="generate.output"
        ) from error


def write(folder: Path, source: Folder, predictions: list[Prediction], max_pixels: int) -> None:
    """``captions.jsonl``, the COCO results form ``captions_coco.json``, and ``captions.html``."""
    rows = [prediction.to_json() for prediction in predictions]
    write_whole(folder / "captions.jsonl", lines(rows))
    write_whole(folder / "captions_coco.json", results(rows))
    shown = [spoken(source, prediction, max_pixels) for prediction in predictions[:_NUM_SHOWN]]
    section = _number(predictions, "image")
    if len(shown) < len(predictions):
        section = f"The first {len(shown)} of {section}"
    write_gallery(folder / "captions.html", f"Captions of {source.root}", section, shown)
