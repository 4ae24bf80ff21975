"""Questions about drawn scenes: answered again by a reader of its own, balanced, in all forms."""

import csv
import itertools
import json
import re
from collections import Counter, defaultdict

import numpy as np
import pytest

from engine import registry
from engine.config.schema import Data
from engine.data.sources import open_source
from engine.errors import UserError
from engine.tools.shapes import folder as drawn
from engine.tools.shapes.questions import _KINDS as KINDS
from engine.tools.shapes.questions import ask
from engine.tools.shapes.scenes import (
    PHRASINGS,
    caption,
    held_out_families,
    one_word_changed,
    one_word_changes,
    training_scenes,
)
from tests.data.formats.folders import image
from tests.tools.shapes.shape_reader import _NOUNS, parse

SIZES = {"small": "small", "little": "small", "large": "large", "big": "large"}
COLOURS = "red|green|blue|yellow|purple|orange"


def scenes(number):
    """Half of them held out: of these a family is four."""
    rng = np.random.default_rng(5)
    held_out = itertools.chain.from_iterable(held_out_families(rng)[: number // 8])
    return [*itertools.islice(training_scenes(rng), number // 2), *held_out]


def groups_of(words, scene):
    """The groups that words such as 'small red star' or 'moons' may mean."""
    found = [scene.first, scene.second]
    for word in words.split():
        if word in SIZES:
            found = [g for g in found if g.size == SIZES[word]]
        elif re.fullmatch(COLOURS, word):
            found = [g for g in found if g.colour == word]
        elif word not in ("shape", "shapes"):
            found = [g for g in found if g.shape == _NOUNS.get(word, word)]
    return found


def only(words, scene):
    [group] = groups_of(words, scene)  # what a question names is there, and once
    plural = words.split()[-1] in _NOUNS
    assert plural == (group.count > 1)
    return group


def place(group, scene):
    """Where a group is, seen from the other one."""
    places = {"left": ("left", "right"), "above": ("above", "below")}[scene.relation]
    return places[group == scene.second]


def answer(text, scene):
    """The answer to a question, by a person's reading of it."""
    if found := re.fullmatch(r'Does this figure show "(.+)"\? Please answer yes or no\.', text):
        return "yes" if parse(found[1]) == scene else "no"
    if found := re.fullmatch(r"What colour (is|are) the (.+)\?", text):
        assert (found[1] == "are") == (found[2].split()[-1] in _NOUNS)
        return only(found[2], scene).colour
    if found := re.fullmatch(r"How many (.+) are there\?", text):
        return str(sum(group.count for group in groups_of(found[1], scene)))
    if found := re.fullmatch(rf"What shape is ({COLOURS})\?", text):
        [group] = groups_of(found[1], scene)
        return group.shape
    if found := re.fullmatch(r"Which shape is (.+?)(?: of)? the (.+)\?", text):
        other = only(found[2], scene)
        [group] = [g for g in (scene.first, scene.second) if g != other]
        assert place(group, scene) == found[1]
        return group.shape
    if found := re.fullmatch(r"Where (?:is|are) the (.+), seen from the (.+)\?", text):
        one, other = only(found[1], scene), only(found[2], scene)
        assert one != other
        return place(one, scene)
    if found := re.fullmatch(r"Is there a (.+)\?", text):
        return "yes" if groups_of(found[1], scene) else "no"
    found = re.fullmatch(r"(?:Is|Are) the (.+?) (left|right|above|below)(?: of)? the (.+)\?", text)
    one, other = only(found[1], scene), only(found[3], scene)
    assert one != other
    return "yes" if place(one, scene) == found[2] else "no"


@pytest.mark.parametrize("style", PHRASINGS)
def test_every_question_has_the_answer_that_a_reader_finds(style):
    rng = np.random.default_rng(1)
    answers = defaultdict(Counter)
    for scene in scenes(1600):
        asked = ask(scene, style, rng)
        assert 5 <= len(asked) <= 6 and len({question.kind for question in asked}) == len(asked)
        for question in asked:
            assert answer(question.text, scene) == question.answer, (question, scene)
            answers[question.kind][question.answer] += 1
    assert set(answers) == set(KINDS)
    shares = {kind: max(c.values()) / c.total() for kind, c in answers.items()}
    most = {"colour": 0.22, "count": 0.4, "shape": 0.22, "relation": 0.3, "yes/no": 0.55}
    assert all(shares[kind] < most.get(kind, 0.55) for kind in KINDS), shares
    assert min(answers["match"].values()) / answers["match"].total() > 0.45


@pytest.mark.parametrize("style", PHRASINGS)
def test_a_caption_with_one_word_changed_is_false(style):
    rng = np.random.default_rng(2)
    kinds = Counter()
    for scene in scenes(100):
        for phrasing in range(len(PHRASINGS[style]["left"])):
            told = caption(scene, style, phrasing)
            changes = one_word_changes(told)
            every = [text for texts in changes.values() for text in texts]
            changed, kind = one_word_changed(told, rng)
            assert changed in changes[kind]
            for text in every:
                words = list(zip(told.split(), text.split(), strict=True))
                assert sum(one != other for one, other in words) == 1
                assert parse(text) != scene == parse(told)
            kinds.update(changes.keys())
            one = {group.count for group in (scene.first, scene.second)} != {1}
            assert ("count" in changes) == one
    assert set(kinds) == {"colour", "shape", "size", "count", "relation"}
    assert kinds["colour"] == kinds["shape"] == kinds["size"] >= kinds["relation"] > 0


def opened(root, split="train", name="mine", **options):
    options = {"format": "shapes", "num_train": 12, "num_valid": 8, "root": "mine", **options}
    data = Data(data_path=str(root), datasets={name: options})
    return open_source(name, split, data, key="data.train_name")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    opened(folder, texts="questions")
    return folder


@pytest.mark.parametrize("split", ["train", "valid"])
def test_all_forms_say_the_same(root, split):
    """Our own CSV and conversations, and VQA v2's files by the format for them."""
    own, talks = opened(root, split, texts="questions"), opened(root, split, texts="conversations")
    vqa = registry.find("data/formats", "vqa")
    config = vqa.Config(
        root=root / "mine",
        **{f"{split}_questions": f"{split}_questions.json",
           f"{split}_annotations": f"{split}_annotations.json",
           f"{split}_images": split, f"{split}_image_name": "%06d.jpg"},
    )  # fmt: skip
    official = vqa.build(config, name="mine", split=split, cache_dir=root / "cache")
    assert len(own) == len(official) > 4 * len(talks)
    spoken = iter([turn for n in range(len(talks)) for turn in talks[n].turns])
    for row in range(len(own)):
        one, other = own[row], official[row]
        assert (one.turns, one.answers, image(one)) == (other.turns, other.answers, image(other))
        assert (one.caption_id, one.question_type) == (other.caption_id, other.question_type)
        assert one.answers == (one.turns[1][1],) * 10 and image(one).is_file()
        first = row == 0 or image(own[row - 1]) != image(one)
        said = next(spoken)[1], next(spoken)[1]
        assert said == ("<image>\n" * first + one.turns[0][1], one.turns[1][1])
    assert next(spoken, None) is None
    matches = opened(root, split, texts="matches")
    assert len(matches) == len(talks)
    kinds = [{each[row].question_type for row in range(len(each))} for each in (own, matches)]
    assert kinds == [set(KINDS) - {"match"}, {"match"}]
    annotations = json.loads((root / "mine" / f"{split}_annotations.json").read_text())
    with (root / "mine" / f"{split}_questions.csv").open(newline="") as file:
        types = [row["answer_type"] for row in csv.DictReader(file)]
    assert [each["answer_type"] for each in annotations["annotations"]] == types
    assert set(types) == {"yes/no", "number", "other"}


def test_captions_are_what_they_were(root, tmp_path):
    """Questions are drawn beside captions, and change neither them nor the images."""
    opened(tmp_path)
    plain, both = tmp_path / "mine", root / "mine"
    files = [p.relative_to(plain) for p in plain.rglob("*.*") if ".engine_cache" not in p.parts]
    assert len(files) == 12 + 8 + 3
    for path in files:
        if path.name != drawn.OPTIONS_FILE:
            assert (plain / path).read_bytes() == (both / path).read_bytes()
    assert list(json.loads((plain / drawn.OPTIONS_FILE).read_text())) == [
        "style", "seed", "num_train", "num_valid", "image_size"
    ]  # fmt: skip
    assert list(opened(root).captions()) == list(opened(tmp_path).captions())


def test_a_folder_drawn_without_questions_is_left_alone(tmp_path):
    opened(tmp_path)
    with pytest.raises(UserError, match=r"questions=False \(wanted: True\)") as error:
        opened(tmp_path, texts="conversations")
    assert error.value.key == "data.datasets.mine.texts"
