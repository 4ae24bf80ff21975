"""Files to batches at 224 pixels: samples per second and core, beside open_clip and bare decoding.

    python -m tests.bench loading [--data FOLDER]

Ours is the engine's loader over a CSV folder, the peer torch's loader over open_clip's own
transform of the same files, both in this process; the limit is simplejpeg decoding the same bytes
out of memory. Photographs are 512 × 342 at quality 90, scaled from those of FOLDER where there are
some and drawn otherwise, and those of Flickr8k as they are. All by processor time, in turns.
"""

from __future__ import annotations

import csv
import statistics
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

import engine.torchvision_ops  # noqa: F401  before open_clip, which imports torchvision

import open_clip  # isort: skip
from engine.config.schema import Transforms
from engine.data.batch_memory import stack_images
from engine.data.loader import valid_batches
from engine.data.transforms import pipeline
from engine.registry import find
from engine.types import Batch, Sample
from tests.bench.table import Line, Options
from tests.bench.timing import in_turns, ratio

SIDE, PHOTOGRAPH, QUALITY = 224, (512, 342), 90
BATCH = 64
WAYS = {  # name: (transforms, whether open_clip is told that it trains)
    "evaluation": (["resize_bicubic", "center_crop"], False),
    "training": (["random_resize_crop"], True),
}


def drawn(number: int) -> Image.Image:
    """A smooth image with some grain, which takes about as many bytes as a photograph."""
    rng = np.random.default_rng(number)
    coarse = Image.fromarray(rng.integers(0, 255, (18, 27, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize(PHOTOGRAPH, Image.Resampling.BICUBIC), np.float32)
    grain = rng.normal(0, 6, (*smooth.shape[:2], 1))
    return Image.fromarray(np.clip(smooth + grain, 0, 255).astype(np.uint8))


def photographs(options: Options, number: int) -> Iterator[Image.Image]:
    """Images of 512 × 342 pixels."""
    folder = options.data / "llava_1k" / "train" if options.data else Path()
    found = sorted(folder.glob("*.jpg"))[:number] if options.data else []
    for i in range(number):
        if i < len(found):
            image = Image.open(found[i]).convert("RGB")
            yield image.resize(PHOTOGRAPH, Image.Resampling.BICUBIC)
        else:
            yield drawn(i)


def write_folder(root: Path, options: Options, number: int) -> list[Path]:
    """A CSV folder of such JPEGs; their paths."""
    paths = [root / "valid" / f"{i:04}.jpg" for i in range(number)]
    paths[0].parent.mkdir(parents=True)
    for path, image in zip(paths, photographs(options, number), strict=True):
        image.save(path, quality=QUALITY)
    _write_table(root, [path.name for path in paths])
    return paths


def flickr8k_folder(root: Path, data: Path, number: int) -> list[Path]:
    """A CSV folder whose images are the first of Flickr8k's."""
    (root / "valid").symlink_to(data / "flickr8k" / "valid")
    paths = sorted((data / "flickr8k" / "valid").glob("*.jpg"))[:number]
    _write_table(root, [path.name for path in paths])
    return paths


def _write_table(root: Path, names: list[str]) -> None:
    with (root / "valid_anno.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("image", "caption"))
        writer.writerows((name, "a photograph") for name in names)


def collate(samples: list[Sample]) -> Batch:
    """The images alone."""
    return {"image_BCHW": stack_images(samples)}


def our_transform(names: list[str]) -> pipeline.Pipeline:
    """At open_clip's options: bicubic, crops of 0.9 … 1.0 of the area."""
    sections: dict[str, Any] = {
        "resize_bicubic": {"size": SIDE, "interpolation": "bicubic"},
        "center_crop": {"size": SIDE},
        "random_resize_crop": {"size": SIDE, "scale": [0.9, 1.0]},
    }
    return pipeline.build(names, Transforms.model_validate(sections), key="transforms")


def ours(root: Path, names: list[str], number: int) -> Callable[[], torch.Tensor]:
    """Reads the whole folder; returns its first batch."""
    form = find("data/formats", "csv")
    source = form.build(form.Config(root=root), name="bench", split="valid", cache_dir=root)
    transform = our_transform(names)
    rows = np.arange(number)

    def work() -> torch.Tensor:
        batches = valid_batches(source, rows, transform, collate, batch_size=BATCH, num_workers=0)
        return _first(batch["image_BCHW"] for _, batch, _ in batches)

    return work


class Files(Dataset):
    """An image opened and transformed, as in open_clip's ``CsvDataset``."""

    def __init__(self, paths: list[Path], transform: Any) -> None:
        self.paths, self.transform = paths, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.transform(Image.open(str(self.paths[index])))


def theirs(paths: list[Path], is_train: bool) -> Callable[[], torch.Tensor]:
    """Reads all files; returns the first batch, in floats."""
    transform = open_clip.image_transform(SIDE, is_train=is_train, mean=(0, 0, 0), std=(1, 1, 1))
    loader = DataLoader(Files(paths, transform), batch_size=BATCH, num_workers=0)
    return lambda: _first(loader)


def _first(batches: Iterable[torch.Tensor]) -> torch.Tensor:
    """The first of all batches; the others are let go as they come."""
    remaining = iter(batches)
    first = next(remaining)
    for _ in remaining:
        pass
    return first


def bare(paths: list[Path]) -> Callable[[], None]:
    """Decodes all files' bytes."""
    encoded = [path.read_bytes() for path in paths]

    def work() -> None:
        for data in encoded:
            simplejpeg.decode_jpeg(data)

    return work


def compare(what: str, root: Path, paths: list[Path], repeats: int) -> Iterator[Line]:
    """Both ways over one folder. In evaluation both sides' pixels are alike to 1 grey level."""
    number = len(paths)
    for way, (names, is_train) in WAYS.items():
        work = {
            "ours": ours(root, names, number),
            "peer": theirs(paths, is_train),
            "bare": bare(paths),
        }
        if not is_train:
            difference = work["ours"]().float() - 255 * work["peer"]()
            assert difference.abs().mean() <= 1.0, difference.abs().mean()
        seconds = in_turns(work, repeats)
        speed = {side: number / max(statistics.median(s), 1e-9) for side, s in seconds.items()}
        # Random crops of Flickr8k's small images are enlarged, which is not decoding's affair.
        for side, mark in (("bare", "" if is_train else "≥ 0.55"), ("peer", "≥ 3")):
            other = {"limit" if side == "bare" else "peer": speed[side]}
            yield Line(
                f"{what}, {way}, ours ÷ {'bare decoding' if side == 'bare' else 'open_clip'}",
                ours=speed["ours"], mark=mark, unit="samples/s", **other,
                **ratio(seconds[side], seconds["ours"]),
            )  # fmt: skip


def rows(options: Options) -> Iterator[Line]:
    """Both kinds of photographs, each in both ways."""
    torch.set_num_threads(1)
    number, repeats = (8, 1) if options.quick else (256, options.repeats)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        paths = write_folder(root / "photographs", options, number)
        yield from compare("512 × 342", root / "photographs", paths, repeats)
        if options.data and (options.data / "flickr8k").is_dir():
            (root / "flickr8k").mkdir()
            paths = flickr8k_folder(root / "flickr8k", options.data, number)
            yield from compare("Flickr8k", root / "flickr8k", paths, repeats)
    torch.set_num_threads(options.threads)
