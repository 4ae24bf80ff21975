"""Scenes put into words: each style has its own phrasings, each of them complete and exact.

No phrasing holds a word that depends on a group's number except the group's own noun, so that the
scenes of a family are told in the same words by the same phrasing.
"""

import functools
import re

import numpy as np

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
    size = SIZE_WORDS[style][group.size]
    return f"{NUMBERS[group.count]} {size} {group.colour} {noun(group)}"


def noun(group: Group) -> str:
    """A group's shape in the singular or the plural, by its number."""
    return group.shape if group.count == 1 else plural(group.shape)


def plural(shape: str) -> str:
    """Several of a shape: 'crosses'."""
    return PLURALS.get(shape, shape + "s")


def one_word_changed(text: str, rng: np.random.Generator) -> tuple[str, str]:
    """A caption that differs from ``text``, a caption of any style, in one word and is false of
    what ``text`` is true of, and the kind of that word; every kind is as likely as another."""
    changes = one_word_changes(text)
    kind = sorted(changes)[rng.integers(len(changes))]
    return changes[kind][rng.integers(len(changes[kind]))], kind


def one_word_changes(text: str) -> dict[str, list[str]]:
    """All captions of another scene than that of ``text`` with one word changed, by the kind of
    word: colour, shape, size, and where one word will do, count and relation."""
    told, tokens = read(text), text.split(" ")
    found: dict[str, list[str]] = {}
    for place, token in enumerate(tokens):
        for kind, alike in _alternatives():
            for other in alike if token in alike else ():
                changed = " ".join((*tokens[:place], other, *tokens[place + 1 :]))
                if read(changed) not in (None, told):
                    found.setdefault(kind, []).append(changed)
    return found


@functools.cache
def _alternatives() -> list[tuple[str, tuple[str, ...]]]:
    """Kinds of words, and words of the kind that can stand for one another."""
    sides = {"left": "right", "above": "below", "over": "under", "higher": "lower"}
    return [
        ("colour", COLOURS),
        ("shape", SHAPES),
        ("shape", tuple(plural(shape) for shape in SHAPES)),
        *(("size", tuple(words.values())) for words in SIZE_WORDS.values()),
        ("count", tuple(word for number, word in NUMBERS.items() if number > 1)),
        *(("relation", pair) for pair in sides.items()),
    ]


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
    nouns = sorted({*SHAPES, *map(plural, SHAPES)})
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
    shapes = {name: name for name in SHAPES} | {plural(n): n for n in SHAPES}
    return Group(counts[count], sizes[size], colour, shapes[noun])
