"""Scenes put into words: each style has its own phrasings, each of them complete and exact.

No phrasing holds a word that depends on a group's number except the group's own noun, so that the
scenes of a family are told in the same words by the same phrasing.
"""

import functools
import re

from engine.data.shapes.scene import COLOURS, SHAPES, Group, Scene

NUMBERS = {1: "one", 2: "two", 3: "three"}
PLURALS = {"cross": "crosses"}
SIZE_WORDS = {
    "flat": {"small": "small", "large": "large"},
    "sketch": {"small": "little", "large": "big"},
}

# {a} is the first group (left of, or above, the second), {b} the second. One list a relation, in
# the same order, half of it told from the second group.
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
    """How many ways a style has to tell any scene."""
    return len(PHRASINGS[style]["left"])


def caption(scene: Scene, style: str, phrasing: int) -> str:
    """The scene in words, by one of the style's phrasings."""
    template = PHRASINGS[style][scene.relation][phrasing]
    return template.format(a=words(scene.first, style), b=words(scene.second, style))


def words(group: Group, style: str) -> str:
    """A group in words: 'two small red circles'."""
    plural = PLURALS.get(group.shape, group.shape + "s")
    noun = group.shape if group.count == 1 else plural
    return f"{NUMBERS[group.count]} {SIZE_WORDS[style][group.size]} {group.colour} {noun}"


def read(text: str) -> Scene | None:
    """The scene that a caption of any style tells; None for one that is none of its wordings."""
    for relation, pattern in _patterns():
        if found := pattern.fullmatch(text.strip().lower().rstrip(".")):
            first, second = (_group(found, letter) for letter in "ab")
            return Scene(first, second, relation)
    return None


@functools.cache
def _patterns() -> list[tuple[str, re.Pattern[str]]]:
    """Every phrasing as a pattern in which {a} and {b} are groups of any number and kind."""
    nouns = sorted({*SHAPES, *(PLURALS.get(shape, shape + "s") for shape in SHAPES)})
    parts = {
        "count": list(NUMBERS.values()),
        "size": [word for words in SIZE_WORDS.values() for word in words.values()],
        "colour": list(COLOURS),
        "noun": nouns,
    }

    def group(letter: str) -> str:
        return " ".join(f"(?P<{part}_{letter}>{'|'.join(w)})" for part, w in parts.items())

    return [
        (relation, re.compile(template.format(a=group("a"), b=group("b"))))
        for style in PHRASINGS.values()
        for relation, templates in style.items()
        for template in templates
    ]


def _group(found: re.Match[str], letter: str) -> Group:
    count, size, colour, noun = (
        found[f"{p}_{letter}"] for p in ("count", "size", "colour", "noun")
    )
    sizes = {word: size for words in SIZE_WORDS.values() for size, word in words.items()}
    counts = {word: number for number, word in NUMBERS.items()}
    shapes = {name: name for name in SHAPES} | {PLURALS.get(n, n + "s"): n for n in SHAPES}
    return Group(counts[count], sizes[size], colour, shapes[noun])
