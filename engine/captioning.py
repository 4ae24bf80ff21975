"""``--mode=generate``: captions for a folder of images, as JSON lines and as a page to look at."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from engine.dist import collectives
from engine.errors import UserError
from engine.evals.captions import speak
from engine.evals.gallery import spoken
from engine.evals.input_images import Folder, open_folder
from engine.evals.predictions import Prediction
from engine.generated import NUM_SHOWN, Output, counted, heading
from engine.logs.progress import Progress
from engine.logs.report import write_gallery
from engine.logs.samples import lines, results, write_whole
from engine.setup import Setup


def generate(setup: Setup) -> None:
    """Caption ``generate.input`` with the run's checkpoint. Raises UserError."""
    if "caption" not in setup.task.modalities:
        raise UserError(
            f"--mode=generate speaks about images, which --task={setup.task_name} does not learn; "
            "take --task=caption"
        )
    section = setup.config.generate
    source = open_folder(section.input)
    output = Output(setup, "captions", len(source), "image")
    module, _ = setup.trained_model()
    output.prepare()
    if collectives.rank() == 0:
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
        stopped=output.after_batch,
    )
    nothing = f"none of the {len(source)} images in {source.root} can be read"
    folder = output.settle(predictions, bad, nothing)
    if folder is None:
        return
    write(folder, source, predictions, setup.config.data.max_image_pixels)
    Progress().message(
        f"{counted(predictions, 'caption')}: {folder / 'captions.jsonl'}, "
        f"{folder / 'captions.html'}"
    )


def write(folder: Path, source: Folder, predictions: list[Prediction], max_pixels: int) -> None:
    """``captions.jsonl``, the COCO results form ``captions_coco.json``, and ``captions.html``."""
    rows = [prediction.to_json() for prediction in predictions]
    write_whole(folder / "captions.jsonl", lines(rows))
    write_whole(folder / "captions_coco.json", results(rows))
    shown = [spoken(source, prediction, max_pixels) for prediction in predictions[:NUM_SHOWN]]
    section = heading(shown, predictions, "image")
    write_gallery(folder / "captions.html", f"Captions of {source.root}", section, shown)
