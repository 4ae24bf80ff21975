"""What a drawn image shows, the scene put into words, and which scenes are held out.

A scene is two groups of shapes side by side or one above the other. Scenes that differ only in what
is bound to what (colours swapped, places swapped, ...) make a family: their captions have the same
words in another order. Whole families are held out, chosen by a hash that knows neither seed nor
style, so that a held-out scene never occurs in the training part of any drawn dataset.
Confusable families follow Winoground (Thrush et al. 2022, arXiv:2204.03162).

Captions state everything (how many, how large, which colour and shape, where) in phrasings of the
image's style. No phrasing holds a word that depends on a group's number except the group's own
noun, so that one phrasing describes all scenes of a family in the same words.
"""

import functools
import hashlib
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import numpy as np

COLOURS = ("red", "green", "blue", "yellow", "purple", "orange")
SHAPES = ("circle", "square", "triangle", "cross", "star", "moon")
SIZES = ("small", "large")
COUNTS = (1, 2, 3)
RELATIONS = ("left", "above")  # of the first group to the second; right and below are inverses
FAMILY_SIZE = 4
HELD_OUT_SHARE = 8  # one family in 8

Swap = Literal["count", "size", "colour", "place"]


@dataclass(frozen=True, slots=True)
class Group:
    """``count`` equal shapes."""

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

    def pair(self, part: str) -> tuple[Any, Any]:
        """An attribute of both groups."""
        return getattr(self.first, part), getattr(self.second, part)

    def swapped(self, what: Swap) -> Self:
        """The scene with one attribute exchanged between the groups, or their places."""
        if what == "place":
            return replace(self, first=self.second, second=self.first)
        one, other = self.pair(what)
        first, second = replace(self.first, **{what: other}), replace(self.second, **{what: one})
        return replace(self, first=first, second=second)


def is_held_out(scene: Scene) -> bool:
    """Whether the scene's whole family is kept from training."""
    pairs = [sorted(map(str, scene.pair(part))) for part in ("count", "size", "colour", "shape")]
    digest = hashlib.blake2b(repr((scene.relation, pairs)).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") % HELD_OUT_SHARE == 0


def training_scenes(rng: np.random.Generator) -> Iterator[Scene]:
    """Distinct random scenes of the training part, without an end."""
    seen = set()
    while True:
        first, second = (_random_group(rng) for _ in range(2))
        scene = Scene(first, second, RELATIONS[rng.integers(len(RELATIONS))])
        alike = (first.colour, first.shape) == (second.colour, second.shape)
        if not alike and scene not in seen and not is_held_out(scene):
            seen.add(scene)
            yield scene


def held_out_families(rng: np.random.Generator) -> list[tuple[Scene, ...]]:
    """Every held-out family that one set of words can describe: 4 distinct scenes each, shuffled.

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
    parts: tuple[Sequence[Any], ...] = COUNTS, SIZES, COLOURS, SHAPES
    return Group(*(values[int(rng.integers(len(values)))] for values in parts))


NUMBERS = {1: "one", 2: "two", 3: "three"}
PLURALS = {"circle": "circles", "square": "squares", "triangle": "triangles",
           "cross": "crosses", "star": "stars", "moon": "moons"}  # fmt: skip
SIZE_WORDS = {
    "flat": {"small": "small", "large": "large"},
    "sketch": {"small": "little", "large": "big"},
}

# {a} is the first group (left of, or above, the second), {b} the second. One list a relation, in
# the same order; half of each begins with the second group.
PHRASINGS: dict[str, dict[str, tuple[str, ...]]] = {
    "flat": {
        "left": (
            "{a} to the left of {b}",
            "{b} to the right of {a}",
            "{a} left of {b}",
            "{b} right of {a}",
            "an image of {a} on the left side of {b}",
            "an image of {b} on the right side of {a}",
        ),
        "above": (
            "{a} above {b}",
            "{b} below {a}",
            "{a} over {b}",
            "{b} under {a}",
            "an image of {a} higher than {b}",
            "an image of {b} lower than {a}",
        ),
    },
    "sketch": {
        "left": (
            "a sketch with {a} on the left and {b} on the right",
            "a sketch with {b} on the right and {a} on the left",
            "{a} drawn left of {b}",
            "{b} drawn right of {a}",
        ),
        "above": (
            "a sketch with {a} at the top and {b} at the bottom",
            "a sketch with {b} at the bottom and {a} at the top",
            "{a} drawn above {b}",
            "{b} drawn below {a}",
        ),
    },
}


def num_phrasings(style: str) -> int:
    """How many phrasings a style has for any scene."""
    return len(PHRASINGS[style]["left"])


def caption(scene: Scene, style: str, phrasing: int) -> str:
    """The scene in words, by one of the style's phrasings."""
    template = PHRASINGS[style][scene.relation][phrasing]
    return template.format(a=_words(scene.first, style), b=_words(scene.second, style))


def _words(group: Group, style: str) -> str:
    size = SIZE_WORDS[style][group.size]
    return f"{NUMBERS[group.count]} {size} {group.colour} {noun(group)}"


def noun(group: Group) -> str:
    """A group's shape in the singular or the plural, by its number."""
    return group.shape if group.count == 1 else PLURALS[group.shape]


def read(text: str) -> Scene | None:
    """The scene that a caption of any style describes; None for any other text."""
    for relation, pattern in _patterns():
        if found := pattern.fullmatch(text.strip().lower().rstrip(".")):
            first, second = (
                Group(*(meanings[found[f"{part}_{letter}"]] for part, meanings in _LEXICON.items()))
                for letter in "ab"
            )
            return Scene(first, second, relation)
    return None


# Each part of a group, in the order in which a caption has them: its words and what they mean.
_LEXICON: dict[str, dict[str, Any]] = {
    "count": {word: number for number, word in NUMBERS.items()},
    "size": {word: size for words in SIZE_WORDS.values() for size, word in words.items()},
    "colour": {colour: colour for colour in COLOURS},
    "shape": {**{name: name for name in SHAPES}, **{word: name for name, word in PLURALS.items()}},
}


@functools.cache
def _patterns() -> list[tuple[str, re.Pattern[str]]]:
    """Every phrasing as a pattern in which {a} and {b} are groups of any number and kind."""

    def group(letter: str) -> str:
        return " ".join(f"(?P<{part}_{letter}>{'|'.join(w)})" for part, w in _LEXICON.items())

    return [
        (relation, re.compile(template.format(a=group("a"), b=group("b"))))
        for style in PHRASINGS.values()
        for relation, templates in style.items()
        for template in templates
    ]


def one_word_changed(text: str, rng: np.random.Generator) -> tuple[str, str]:
    """A caption that differs from ``text``, a caption of any style, in one word and is false of
    what ``text`` is true of, and the kind of that word; every kind is equally likely."""
    changes = one_word_changes(text)
    kind = sorted(changes)[rng.integers(len(changes))]
    return changes[kind][rng.integers(len(changes[kind]))], kind


def one_word_changes(text: str) -> dict[str, list[str]]:
    """All captions of another scene than that of ``text`` with one word changed, by the kind of
    word: colour, shape, size, and where one word is enough, count and relation."""
    scene, tokens = read(text), text.split(" ")
    found: dict[str, list[str]] = {}
    for place, token in enumerate(tokens):
        for kind, alternatives in _ALTERNATIVES:
            for other in alternatives if token in alternatives else ():
                changed = " ".join((*tokens[:place], other, *tokens[place + 1 :]))
                if read(changed) not in (None, scene):
                    found.setdefault(kind, []).append(changed)
    return found


_ALTERNATIVES: list[tuple[str, tuple[str, ...]]] = [  # kinds of words that can replace one another
    ("colour", COLOURS),
    ("shape", SHAPES),
    ("shape", tuple(PLURALS.values())),
    *(("size", tuple(words.values())) for words in SIZE_WORDS.values()),
    ("count", ("two", "three")),
    *(("relation", pair) for pair in (
        ("left", "right"), ("above", "below"), ("over", "under"), ("higher", "lower")
    )),
]  # fmt: skip


def content_scores(captions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Share, in percent, of scenes described right: whole, and colours, shapes, counts, relation.

    Nothing where a reference describes no scene. A caption that describes none has all wrong.
    """
    pairs = [(read(said), read(true)) for said, true in zip(captions, references, strict=True)]
    if any(true is None for _, true in pairs):
        return {}
    known = [(said, true) for said, true in pairs if said is not None and true is not None]
    right = {
        part: [said.pair(part) == true.pair(part) for said, true in known]
        for part in ("colour", "shape", "count", "size")
    }
    right["relation"] = [said.relation == true.relation for said, true in known]
    right["scene"] = [said == true for said, true in known]
    return {f"content_{name}": 100 / len(pairs) * sum(hits) for name, hits in right.items()}
