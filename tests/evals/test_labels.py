"""Classes by name, from rows that name them."""

from dataclasses import replace

import numpy as np
import pytest

from engine.config import schema
from engine.data.sources import open_source
from engine.errors import UserError
from engine.evals import linear_probe, zero_shot
from engine.evals.labels import NamedLabels, class_names, plain
from engine.evals.prompts import Prompts
from tests import distributed
from tests.evals.colours import ColourSource, colours, encoder, png

WORDS = ("very red", "green", "blue")
CLASSES = (("250 10 10",), ("10 250 10",), ("10 10 250",))


class NamedColours(ColourSource):
    """Rows name the class of their strongest channel."""

    def __init__(self, count=40, seed=0, words=WORDS, split="valid"):
        super().__init__([(png(c), "image", i, None) for i, c in enumerate(colours(count, seed))])
        self.words = [words[int(np.argmax(c))] for c in colours(count, seed)]
        self.split = split

    def __getitem__(self, index):
        word = self.words[index]
        record = super().__getitem__(index)
        return replace(record, labels=word if isinstance(word, tuple) else (word,))


def prompts():
    return Prompts(CLASSES, ("{}",), folders=("Very_Red", "green", "BLUE"), origin="c.json")


def test_zero_shot_by_names():
    found = zero_shot.evaluate(encoder(), NamedColours(), prompts())
    assert found.metrics["accuracy@1"] > 95
    swapped = NamedColours(words=("green", "very red", "blue"))
    assert zero_shot.evaluate(encoder(), swapped, prompts()).metrics["accuracy@1"] < 50


def test_a_name_is_taken_as_it_stands_before_it_is_made_plain():
    numbers = Prompts((("C",), ("C++",)), ("{}",)).numbers()
    assert (numbers["C"], numbers["C++"]) == (0, 1)
    assert plain("Very_Red ") == "veryred"


def test_probe_by_names():
    config = schema.LinearProbe(regularisation=[0.1])
    train, valid = NamedColours(60, split="train"), NamedColours(60, seed=1)
    assert class_names(train, valid) == sorted(WORDS)
    found = linear_probe.evaluate(encoder(), train, valid, config)
    assert found.metrics["accuracy@1"] > 90
    others = NamedColours(60, seed=1, words=("very red", "teal", "azure"))  # not seen in training
    found = linear_probe.evaluate(encoder(), train, others, config)
    assert 10 < found.metrics["accuracy@1"] < 60


def test_rows_that_cannot_be_classified():
    source = NamedColours(6)
    source.words[2] = ("green", "blue")
    with pytest.raises(UserError, match=r"row 2 of dataset 'colours' names several .*green, blue"):
        zero_shot.evaluate(encoder(), source, prompts())
    source.words[2] = "gren"
    with pytest.raises(UserError, match=r"'gren', which c\.json does not .* did you mean 'green'"):
        zero_shot.evaluate(encoder(), source, prompts())
    source.words[2] = ()
    with pytest.raises(UserError, match="row 2 of dataset 'colours' has no label"):
        zero_shot.evaluate(encoder(), source, prompts())
    numbered = NamedLabels(ColourSource([(png((1, 2, 3)), "image", 0, 7)]), {"a": 0}, "here")
    assert numbered[0].label == 7


def names_of_two():
    return class_names(NamedColours(10), NamedColours(7, words=("a", "b", "c")))


def test_names_are_the_same_on_every_rank():
    assert distributed.run(names_of_two, 2) == [names_of_two()] * 2
    assert set(names_of_two()) == {*WORDS, "a", "b", "c"}


def test_a_csv_of_labels(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for split, seed in (("train", 0), ("valid", 1)):
        (tmp_path / "pets" / split).mkdir(parents=True)
        lines = ["image,labels"]
        for i, colour in enumerate(colours(40, seed)):
            (tmp_path / "pets" / split / f"{i}.png").write_bytes(png(colour))
            lines.append(f"{i}.png,{WORDS[int(np.argmax(colour))]}")
        (tmp_path / "pets" / f"{split}_anno.csv").write_text("\n".join(lines) + "\n")
    data = schema.Data(data_path=str(tmp_path))
    train, valid = (open_source("pets", s, data, key="x") for s in ("train", "valid"))
    found = zero_shot.evaluate(encoder(num_workers=1), valid, prompts())
    assert found.metrics["accuracy@1"] > 95
    config = schema.LinearProbe(regularisation=[0.1])
    probed = linear_probe.evaluate(encoder(), train, valid, config)
    assert probed.metrics["accuracy@1"] > 90
