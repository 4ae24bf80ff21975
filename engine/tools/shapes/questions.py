"""Questions about a scene, each with the one answer that is true, in words of a style.

    colour    What colour is the star?                       → red
    count     How many moons are there?                      → 2
    shape     What shape is red?                             → star
              Which shape is left of the red circle?         → star
    relation  Where is the star, seen from the circle?       → left
    yes/no    Is there a small red star?                     → yes
    match     Does this figure show "…"? Please answer yes or no.

A question is asked only where what it names is one group alone, so that it has one answer. Yes and
no are equally likely; what is false differs in one word from what is true.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from numpy.random import Generator

from engine.tools.shapes.scenes import (
    COLOURS,
    PLURALS,
    SHAPES,
    SIZE_WORDS,
    SIZES,
    Group,
    Scene,
    caption,
    noun,
    num_phrasings,
    one_word_changed,
)

_SIDES = {"left": ("left of", "right of"), "above": ("above", "below")}


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked for (``kind``), in which words, and the answer."""

    kind: str
    text: str
    answer: str

    @property
    def answer_type(self) -> str:
        """As VQA v2 has it: yes/no, number or other."""
        return {"yes/no": "yes/no", "match": "yes/no", "count": "number"}.get(self.kind, "other")


_Asked = tuple[str, str] | None  # a question and its answer, where there is one


def ask(scene: Scene, style: str, rng: Generator) -> list[Question]:
    """One question of each kind that the scene allows, in a random order: all but colour always."""
    asked = []
    for kind, make in _KINDS.items():
        pair = scene.first, scene.second
        if kind != "match" and not rng.integers(2):
            pair = pair[::-1]
        if found := make(scene, *pair, style, rng):
            asked.append(Question(kind, *found))
    return [asked[place] for place in rng.permutation(len(asked))]


def _colour(scene: Scene, group: Group, other: Group, style: str, rng: Generator) -> _Asked:
    words = [noun(group)]
    if group.shape == other.shape:
        if group.size == other.size:
            return None
        words.insert(0, SIZE_WORDS[style][group.size])
    return f"What colour {_be(group)} the {' '.join(words)}?", group.colour


def _count(scene: Scene, group: Group, other: Group, style: str, rng: Generator) -> _Asked:
    if rng.random() < 2 / 3:
        named, same = PLURALS[group.shape], group.shape == other.shape
    else:
        named, same = f"{group.colour} shapes", group.colour == other.colour
    return f"How many {named} are there?", str(group.count + same * other.count)


def _shape(scene: Scene, group: Group, other: Group, style: str, rng: Generator) -> _Asked:
    if group.colour != other.colour and rng.random() < 0.5:
        return f"What shape is {group.colour}?", group.shape
    side = _SIDES[scene.relation][group is scene.second]
    return f"Which shape is {side} the {other.colour} {noun(other)}?", group.shape


def _relation(scene: Scene, group: Group, other: Group, style: str, rng: Generator) -> _Asked:
    one, another = _names(group, other)
    place = _SIDES[scene.relation][group is scene.second].removesuffix(" of")
    return f"Where {_be(group)} the {one}, seen from the {another}?", place


def _yes_no(scene: Scene, group: Group, other: Group, style: str, rng: Generator) -> _Asked:
    answer = ("no", "yes")[rng.integers(2)]
    if rng.random() < 0.5:
        one, another = _names(group, other)
        side = _SIDES[scene.relation][(group is scene.second) == (answer == "yes")]
        return f"{_be(group).capitalize()} the {one} {side} the {another}?", answer
    named = group if answer == "yes" else _absent(scene, group, rng)
    size = SIZE_WORDS[style][named.size]
    return f"Is there a {size} {named.colour} {named.shape}?", answer


def _match(scene: Scene, group: Group, other: Group, style: str, rng: Generator) -> _Asked:
    text = caption(scene, style, int(rng.integers(num_phrasings(style))))
    answer = ("no", "yes")[rng.integers(2)]
    if answer == "no":
        text, _ = one_word_changed(text, rng)
    return f'Does this figure show "{text}"? Please answer yes or no.', answer


_KINDS: dict[str, Callable[[Scene, Group, Group, str, Generator], _Asked]] = {
    "colour": _colour,
    "count": _count,
    "shape": _shape,
    "relation": _relation,
    "yes/no": _yes_no,
    "match": _match,
}


def _be(group: Group) -> str:
    return "is" if group.count == 1 else "are"


def _names(group: Group, other: Group) -> tuple[str, str]:
    """Each of two groups by its shape, with its colour where the shapes are the same."""
    if group.shape != other.shape:
        return noun(group), noun(other)
    return f"{group.colour} {noun(group)}", f"{other.colour} {noun(other)}"


def _absent(scene: Scene, group: Group, rng: Generator) -> Group:
    """A group with one attribute changed, such that the scene has none like it."""
    there = [replace(each, count=group.count) for each in (scene.first, scene.second)]
    possible = []
    for part, values in (("size", SIZES), ("colour", COLOURS), ("shape", SHAPES)):
        new: list[dict[str, Any]] = [{part: value} for value in values]
        changed = [replace(group, **each) for each in new]
        if others := [each for each in changed if each not in there]:
            possible.append(others)
    changed = possible[rng.integers(len(possible))]
    return changed[rng.integers(len(changed))]
