"""What objects a drawn scene shows: the labels of recognition."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path

from engine.data.shapes.scene import Scene


def shown(scene: Scene) -> list[str]:
    """Colour and shape of each kind of object, once: 'red circle', 'blue star'."""
    named = (f"{group.colour} {group.shape}" for group in (scene.first, scene.second))
    return list(dict.fromkeys(named))


def write(path: Path, rows: Iterable[tuple[str, list[str]]]) -> None:
    """A CSV of images and their labels, joined by ``|``."""
    with path.open("w", newline="", encoding="utf8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("image", "labels"))
        writer.writerows((image, "|".join(labels)) for image, labels in rows)
