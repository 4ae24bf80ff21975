"""What is learned of COCO's objects from a few labelled photographs, beside naming the commonest.

    python -m tests.bench.objects --data FOLDER --init RUN [--threads N] [section.key=value …]

``FOLDER/coco`` has objects.csv (image, labels) and images.csv (image, coco2017_split). Images of
train2017 are learned from, those of val2017 scored, by launch.py with the YAML of COCO's objects,
from the run that its ``model.init`` names.
"""

from __future__ import annotations

import argparse
import csv
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engine.logs.jsonl import read
from engine.logs.run_log import METRICS_FILE
from tests.bench.runs import ROOT, as_overrides, run_process
from tests.bench.table import Line, machine, table

CONFIG = ROOT / "configs" / "recognize" / "coco_objects.yaml"
SPLITS = {"train": "train2017", "valid": "val2017"}


def split(data: Path, folder: Path) -> dict[str, Any]:
    """Write a CSV for each split; returns the dataset's section and its numbers of images."""
    with (data / "coco" / "images.csv").open(encoding="utf8", newline="") as file:
        of = {row["image"]: row["coco2017_split"] for row in csv.DictReader(file)}
    with (data / "coco" / "objects.csv").open(encoding="utf8", newline="") as file:
        rows = list(csv.DictReader(file))
    section: dict[str, Any] = {"format": "csv", "root": str(data / "coco")}
    for name, wanted in SPLITS.items():
        path = folder / f"{name}.csv"
        with path.open("w", encoding="utf8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["image", "labels"])
            writer.writerows([r["image"], r["labels"]] for r in rows if of[r["image"]] == wanted)
        section |= {f"{name}_anno": str(path), f"{name}_images": "."}
    return section


def learned(data: Path, init: str, threads: int, folder: Path, more: list[str]) -> Iterator[Line]:
    """Train and score; the last evaluation's lines."""
    output = folder / "output"
    values = {
        "data.datasets": {"coco": split(data, folder)}, "model.init": init,
        "ckpt.dir": str(output), "dist.num_threads": threads,
    }  # fmt: skip
    command = [sys.executable, "launch.py", "--task=recognize", f"--cfg={CONFIG}"]
    took = run_process([*command, *as_overrides(values), *more], folder / "console.txt", threads)
    rows = [row for row in read(output / "coco_objects" / METRICS_FILE) if "coco/mAP" in row]
    found = {name.removeprefix("coco/"): value for name, value in rows[-1].items()}
    for name, value in found.items():
        beside = "chance_mAP" if name == "mAP" else f"commonest_{name}"
        if beside in found:
            yield Line(name, value, found[beside], unit="%")
    yield Line("processor time", took.cpu_seconds, unit="s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds coco/")
    parser.add_argument("--init", required=True, help="run that flickr8k_nouns.yaml trained")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    given = parser.parse_intermixed_args()
    init = str(Path(given.init).resolve())
    print(machine(given.threads), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        lines = learned(given.data.resolve(), init, given.threads, Path(folder), given.overrides)
        print(table(lines, ("what", "", "ours", "commonest", "", "", "")))


if __name__ == "__main__":
    main()
