"""A drawn dataset written once in the CSV folder form that a user's own data has."""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from engine.data.shapes import objects, questions_files
from engine.data.shapes.drawing import draw
from engine.data.shapes.questions import Question, ask
from engine.data.shapes.scene import FAMILY_SIZE, Scene, held_out_families, training_scenes
from engine.data.shapes.wording import PHRASINGS, caption, num_phrasings, one_word_changed

OPTIONS_FILE = "shapes.json"


@dataclass(frozen=True, slots=True)
class Options:
    """What a drawn dataset is a pure function of."""

    style: str = "flat"
    seed: int = 0
    num_train: int = 6000
    num_valid: int = 600
    image_size: int = 64
    questions: bool = False  # beside the captions, which are the same
    labels: bool = False  # likewise


def read_options(folder: Path) -> Options | None:
    """What the dataset in ``folder`` was drawn with; None for a folder that was not drawn."""
    try:
        return Options(**json.loads((folder / OPTIONS_FILE).read_text(encoding="utf8")))
    except FileNotFoundError:
        return None


def write(folder: Path, options: Options) -> None:
    """Draw both splits into the empty ``folder``: images, texts, and the options used."""
    for number, (split, scenes) in enumerate((("train", _training), ("valid", _held_out))):
        (folder / split).mkdir()
        rows: list[tuple[str, int, str, int]] = []
        asked: list[tuple[str, list[Question]]] = []
        pairs: list[tuple[str, str, str, str]] = []
        shown: list[tuple[str, list[str]]] = []
        for i, (scene, phrasing) in enumerate(scenes(options)):
            name = f"{i:06d}.jpg"
            rng = np.random.default_rng([*_key(options, number), 1 + i])
            image = draw(scene, options.style, options.image_size, rng)
            # Without chroma subsampling: at 64 pixels it would blend neighbouring colours.
            image.save(folder / split / name, quality=90, subsampling=0)
            rows.append((name, i, caption(scene, options.style, phrasing), i))
            if options.labels:
                shown.append((name, objects.shown(scene)))
            if options.questions:
                rng = np.random.default_rng([*_key(options, number), 1 + i, 1])
                asked.append((name, ask(scene, options.style, rng)))
                pairs.append((name, rows[-1][2], *one_word_changed(rows[-1][2], rng)))
        with (folder / f"{split}_anno.csv").open("w", newline="", encoding="utf8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(("image", "image_id", "caption", "caption_id"))
            writer.writerows(rows)
        if asked:
            questions_files.write(folder, split, asked)
            questions_files.write_pairs(folder / f"{split}_pairs.csv", pairs)
        if shown:
            objects.write(folder / f"{split}_labels.csv", shown)
    told = asdict(options)
    for more in ("questions", "labels"):
        if not told[more]:
            del told[more]
    (folder / OPTIONS_FILE).write_text(json.dumps(told) + "\n", encoding="utf8")


def _key(options: Options, split: int) -> list[int]:
    return [options.seed, list(PHRASINGS).index(options.style), split]


def _training(options: Options) -> Iterator[tuple[Scene, int]]:
    rng = np.random.default_rng(_key(options, 0))
    for scene in itertools.islice(training_scenes(rng), options.num_train):
        yield scene, int(rng.integers(num_phrasings(options.style)))


def _held_out(options: Options) -> Iterator[tuple[Scene, int]]:
    """Whole families, each told by one phrasing, so that words alone do not tell its scenes."""
    rng = np.random.default_rng(_key(options, 1))
    families = held_out_families(rng)[: -(-options.num_valid // FAMILY_SIZE)]
    told = [
        (scene, phrasing)
        for family in families
        for phrasing in (int(rng.integers(num_phrasings(options.style))),)
        for scene in family
    ]
    yield from told[: options.num_valid]
