"""What a drawn image shows, which captions are true of it, and which scenes are held out.

A scene is two groups of shapes side by side or one above the other. Scenes that differ only in what
is bound to what (colours swapped, places swapped, ...) make a family: their captions have the same
words in another order. Whole families are held out, chosen by a hash that knows neither seed nor
style, so that a held-out scene never occurs in the training part of any drawn dataset.
Confusable families follow Winoground (Thrush et al. 2022, arXiv:2204.03162).
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

COLOURS = ("red", "green", "blue", "yellow", "purple", "orange")
SHAPES = ("circle", "square", "triangle", "cross", "star", "moon")
SIZES = ("small", "large")
COUNTS = (1, 2, 3)
RELATIONS = ("left", "above")  # of the first group to the second; right and below are inverses
FAMILY_SIZE = 4
HELD_OUT_SHARE = 8  # one family in so many

Swap = Literal["count", "size", "colour", "place"]


@dataclass(frozen=True, slots=True)
class Group:
    """So many equal shapes."""

    count: int
    size: str
    colour: str
    shape: str


@dataclass(frozen=True, slots=True)
class Scene:
    """``first`` is ``relation`` (left of, or above) ``second``: one form for each arrangement."""

    first: Group
    second: Group
    relation: str

    def swapped(self, what: Swap) -> Scene:
        """The scene with one attribute exchanged between the groups, or their places."""
        a, b = self.first, self.second
        if what == "place":
            return Scene(b, a, self.relation)
        old = {what: getattr(b, what)}, {what: getattr(a, what)}
        return Scene(replace(a, **old[0]), replace(b, **old[1]), self.relation)


def true_of(said: Scene, shown: Scene) -> bool:
    """Whether a caption that says ``said`` is true of an image that shows ``shown``.

    Captions state everything (how many, how large, which colour and shape, where) and a scene has
    one form, the inverse relation being stored the other way round: so truth is equality.
    """
    return said == shown


def is_held_out(scene: Scene) -> bool:
    """Whether the scene's whole family is kept from training."""
    pairs = [
        sorted(str(getattr(group, part)) for group in (scene.first, scene.second))
        for part in ("count", "size", "colour", "shape")
    ]
    digest = hashlib.blake2b(repr((scene.relation, pairs)).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") % HELD_OUT_SHARE == 0


def training_scenes(rng: np.random.Generator) -> Iterator[Scene]:
    """Distinct random scenes of the training part, as long as one asks."""
    seen = set()
    while True:
        first, second = (_random_group(rng) for _ in range(2))
        scene = Scene(first, second, RELATIONS[rng.integers(len(RELATIONS))])
        alike = (first.colour, first.shape) == (second.colour, second.shape)
        if not alike and scene not in seen and not is_held_out(scene):
            seen.add(scene)
            yield scene


def held_out_families(rng: np.random.Generator) -> list[tuple[Scene, ...]]:
    """Every held-out family that can be told in one set of words: 4 distinct scenes each, shuffled.

    Two swaps, drawn anew for each family, make its four scenes. Counts are swapped only where both
    are plural: with one and two, 'circle' would become 'circles' and the words would differ.
    """
    families = []
    for seed in _held_out_seeds():
        possible: list[Swap] = ["place", "colour"]  # seeds differ in colour and shape
        if seed.first.size != seed.second.size:
            possible.append("size")
        if seed.first.count != seed.second.count and 1 not in (seed.first.count, seed.second.count):
            possible.append("count")
        one, other = (possible[i] for i in rng.permutation(len(possible))[:2])
        pair = (seed, seed.swapped(one))
        families.append((*pair, *(scene.swapped(other) for scene in pair)))
    return [families[i] for i in rng.permutation(len(families))]


def _held_out_seeds() -> Iterator[Scene]:
    """One scene of each held-out family whose groups differ in colour and in shape."""
    pairs = itertools.product(
        itertools.combinations_with_replacement(COUNTS, 2),
        itertools.combinations_with_replacement(SIZES, 2),
        itertools.combinations(COLOURS, 2),
        itertools.combinations(SHAPES, 2),
        RELATIONS,
    )
    for *parts, relation in pairs:
        first, second = (Group(*group) for group in zip(*parts, strict=True))
        scene = Scene(first, second, str(relation))
        if is_held_out(scene):
            yield scene


def _random_group(rng: np.random.Generator) -> Group:
    count, size, colour, shape = (
        rng.integers(len(values)) for values in (COUNTS, SIZES, COLOURS, SHAPES)
    )
    return Group(COUNTS[count], SIZES[size], COLOURS[colour], SHAPES[shape])
