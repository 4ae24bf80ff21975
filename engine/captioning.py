"""``--mode=generate``: captions for a folder of images, as JSON lines and as a page to look at."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from engine.data.bad_samples import BadSamples, summary
from engine.dist import collectives
from engine.errors import UserError
from engine.evals.captions import Prediction, speak
from engine.logs.progress import Progress
from engine.logs.report import Example, write_gallery
from engine.setup import Setup
from engine.types import Record

SUFFIXES = (
    ".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".ppm", ".tif", ".tiff", ".avif", ".jp2"
)  # fmt: skip
_NUM_SHOWN = 200  # images on the page


class Folder:
    """The images below a folder, by their sorted relative paths; no captions."""

    split = "input"

    def __init__(self, root: Path) -> None:
        self.root, self.name = root, root.name
        self.paths = sorted(
            str((Path(folder) / file).relative_to(root))
            for folder, _, files in os.walk(root)
            for file in files
            if file.lower().endswith(SUFFIXES) and not file.startswith(".")
        )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Record:
        path = self.paths[index]
        return Record(path, self.root / path, "", path, str(index))

    def column(self, name: str) -> np.ndarray:
        """int64 [rows]: every image is its own."""
        return np.arange(len(self))

    def captions(self) -> Iterator[str]:
        """One empty text an image."""
        return iter([""] * len(self))


def generate(setup: Setup) -> None:
    """Caption ``generate.input`` with the run's checkpoint. Raises UserError."""
    section = setup.config.generate
    source = _folder(section.input)
    module, _ = setup.trained_model()
    evaluations = setup.evaluate
    predictions, bad = speak(
        evaluations.encoder(module),
        source,
        np.arange(len(source)),
        section,
        setup.config.data.prompt.instruction,
        evaluations.judge("ranker"),
    )
    if collectives.rank() != 0:
        return
    folder = Path(section.output) if section.output else setup.run_dir / "captions"
    folder.mkdir(parents=True, exist_ok=True)
    write(folder, source, predictions)
    say = Progress().message
    if bad:
        BadSamples(folder / "bad_samples.jsonl", 1.0).add(bad, seen=len(source))
        say(f"warning: {len(bad)} images left out: {summary(bad)}")
    say(f"{len(predictions)} captions: {folder / 'captions.jsonl'}, {folder / 'captions.html'}")


def _folder(name: str | None) -> Folder:
    if name is None:
        raise UserError("--mode=generate needs a folder of images: input=DIR", key="generate.input")
    root = Path(name)
    if not root.is_dir():
        raise UserError(f"there is no folder {root}", key="generate.input")
    source = Folder(root)
    if not len(source):
        raise UserError(
            f"{root} holds no images; known endings: {' '.join(SUFFIXES)}", key="generate.input"
        )
    return source


def write(folder: Path, source: Folder, predictions: list[Prediction]) -> None:
    """``captions.jsonl``, the COCO results form ``captions_coco.json``, and ``captions.html``."""
    lines = [json.dumps(p.to_json(), ensure_ascii=False) for p in predictions]
    (folder / "captions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf8")
    coco = [{"image_id": p.image_id, "caption": p.caption} for p in predictions]
    (folder / "captions_coco.json").write_text(
        json.dumps(coco, ensure_ascii=False, indent=0), encoding="utf8"
    )
    shown = predictions[:_NUM_SHOWN]
    examples = [
        Example((source.root / p.image_id).read_bytes(), [p.image_id], [(p.caption, None)])
        for p in shown
    ]
    write_gallery(folder / "captions.html", f"Captions of {source.root}", examples)
