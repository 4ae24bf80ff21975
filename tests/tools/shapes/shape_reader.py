"""What the built-in dataset's captions say, read independently of the code that made them."""

import csv
import re
from pathlib import Path

from engine.tools.shapes.scenes import Group, Scene

_GROUP = re.compile(r"(one|two|three) (small|little|large|big) (\w+) (\w+)")
_NOUNS = {"circles": "circle", "squares": "square", "triangles": "triangle",
          "crosses": "cross", "stars": "star", "moons": "moon"}  # fmt: skip


def parse(text: str) -> Scene:
    """What a caption says, by a person's reading of it."""
    first, second = _GROUP.finditer(text)
    groups = [
        Group(
            {"one": 1, "two": 2, "three": 3}[number],
            {"small": "small", "little": "small", "large": "large", "big": "large"}[size],
            colour,
            _NOUNS.get(noun, noun),
        )
        for number, size, colour, noun in (first.groups(), second.groups())
    ]
    between = set(text[first.end() : second.start()].split())
    found = [
        (relation, is_inverse)
        for relation, is_inverse, words in (
            ("left", False, {"left"}),
            ("left", True, {"right"}),
            ("above", False, {"above", "over", "higher", "top"}),
            ("above", True, {"below", "under", "lower", "bottom"}),
        )
        if between & words
    ]
    [(relation, is_inverse)] = found
    return Scene(*(groups[::-1] if is_inverse else groups), relation)


def rows(folder: Path, split: str) -> list[dict[str, str]]:
    with (folder / f"{split}_anno.csv").open(newline="", encoding="utf8") as file:
        return list(csv.DictReader(file))
