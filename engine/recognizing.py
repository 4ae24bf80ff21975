"""``--mode=generate`` of ``--task=recognize``: labels of a folder of images, with probabilities.

labels.jsonl      a line an image: its labels, the best first, each with its probability
labels.html       a page to look at
attention/IMAGE/  with generate.attention: where each label looked, a picture each
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from PIL import Image

from engine.data.loader import valid_batches
from engine.dist import collectives
from engine.evals.encode import Encoder, evaluating
from engine.evals.input_images import Folder, open_folder
from engine.evals.recognised import Recognised, shown
from engine.evals.recognition import recognise
from engine.generate.attention import attention_maps
from engine.generated import NUM_SHOWN, Output, counted, heading
from engine.logs import overlay
from engine.logs.progress import Progress
from engine.logs.report import write_gallery
from engine.logs.samples import lines, write_whole
from engine.setup import Setup

_LABELS, _PAGE = "labels.jsonl", "labels.html"


def generate(setup: Setup) -> None:
    """Label ``generate.input`` with the run's checkpoint. Raises UserError."""
    section = setup.config.generate
    source = open_folder(section.input)
    output = Output(setup, "labels", len(source), "image")
    ranker, _ = setup.evaluate.judges.of_labels(setup.task)
    module, _ = setup.trained_model()
    output.prepare()
    if collectives.rank() == 0:
        for closed in source.closed:
            setup.warn(f"left out: {closed}")
    encoder = setup.evaluate.encoder(module)
    rows = np.arange(len(source))
    found, _, bad = recognise(encoder, source, rows, section, ranker, stopped=output.after_batch)
    nothing = f"none of the {len(source)} images in {source.root} can be read"
    folder = output.settle(found, bad, nothing)
    if folder is None:
        return
    write(folder, source, found, setup.config.data.max_image_pixels)
    told = ""
    if section.attention and not output.stopped:
        pictures = write_attention(folder / "attention", encoder, source, found)
        told = f", {pictures} pictures: {folder / 'attention'}"
    number = f"labels of {counted(found, 'image')}"
    Progress().message(f"{number}: {folder / _LABELS}, {folder / _PAGE}{told}")


def write(folder: Path, source: Folder, found: Sequence[Recognised], max_pixels: int) -> None:
    """``labels.jsonl`` and ``labels.html``."""
    write_whole(folder / _LABELS, lines([one.to_json() for one in found]))
    examples = [shown(source, one, max_pixels) for one in found[:NUM_SHOWN]]
    section = heading(examples, found, "image")
    write_gallery(folder / _PAGE, f"Labels of {source.root}", section, examples)


def write_attention(
    folder: Path, encoder: Encoder, source: Folder, found: Sequence[Recognised]
) -> int:
    """A picture for each label of each image; returns their number.

    The image is shown as the model saw it, cropped and squeezed by the transforms.
    """
    model: Any = encoder.model
    task: Any = encoder.task
    labels = {one.row: one for one in found}
    number = 0
    batches = valid_batches(
        source, np.asarray(sorted(labels)), encoder.transform, task.pictures,
        batch_size=1, rank=0, world=1, num_workers=encoder.num_workers, limits=encoder.limits,
    )  # fmt: skip
    with evaluating(model):
        for _, batch, _ in batches:
            if not batch:
                continue
            one = labels[int(batch["index_B"][0])]
            image_1CHW = batch["image_BCHW"].to(encoder.device)
            with encoder.autocast():
                maps = attention_maps(task, model, image_1CHW, [a.ids for a in one.labels])
            seen = Image.fromarray(image_1CHW[0].permute(1, 2, 0).cpu().numpy())
            place = folder / one.image_id
            place.mkdir(parents=True, exist_ok=True)
            for earlier in place.glob("[0-9][0-9]_*.png"):  # of other labels
                earlier.unlink()
            for rank, (label, weight_hw) in enumerate(zip(one.labels, maps, strict=True), 1):
                drawn = overlay.draw(
                    seen, weight_hw.cpu().numpy(), f"{label.text}  {label.prob:.3f}"
                )
                drawn.save(place / f"{rank:02d}_{quote(label.text, safe=' ')[:80]}.png")
                number += 1
    return number
