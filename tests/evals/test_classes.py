"""Classes: files of names and templates as they are published, and rows that name theirs."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engine.config import schema
from engine.data.sources import open_source
from engine.errors import UserError
from engine.evals import classes as evals_classes
from engine.evals import linear_probe, zero_shot
from engine.evals.classes import NamedLabels, Prompts, class_names, plain
from tests import distributed
from tests.evals.colours import ColourSource, colours, png, predictor

SHIPPED = Path(__file__).resolve().parents[2] / "data" / "prompts" / "templates.json"


def write(folder, name, value):
    path = folder / name
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


@pytest.mark.parametrize(
    ("name", "value", "folders"),
    [
        ("a.json", ["red fox", "hen"], None),
        ("a.txt", "red fox\n\n  hen \n", None),
        ("a.json", {"n01": "red fox", "n02": "hen"}, ("n01", "n02")),
        ("a.json", {"1": "hen", "0": "red fox"}, None),
        ("a.json", {"0": ["n01", "red fox"], "1": ["n02", "hen"]}, ("n01", "n02")),
        ("a.json", {"classes": ["red fox", "hen"]}, None),
    ],
)
def test_forms_of_class_files(tmp_path, name, value, folders):
    loaded = evals_classes.load(write(tmp_path, name, value))
    assert loaded.classes == (("red fox",), ("hen",))
    assert loaded.folders == folders
    assert loaded.templates == ("a photo of a {}.",)
    assert loaded.texts(1) == ["a photo of a hen."]


@pytest.mark.parametrize(
    ("name", "value"),
    [("t.json", ["a {}.", "the {c}"]), ("t.txt", "a {}.\nthe {c}\n"),
     ("t.json", {"classes": ["x"], "templates": ["a {}.", "the {c}"]})],
)  # fmt: skip
def test_forms_of_template_files(tmp_path, name, value):
    classes = write(tmp_path, "c.txt", "hen")
    loaded = evals_classes.load(classes, write(tmp_path, name, value))
    assert loaded.texts(0) == ["a hen.", "the hen"]


def test_several_sets_in_one_file(tmp_path):
    path = write(tmp_path, "sets.json", {
        "Pets": {"classes": ["cat"], "templates": ["a pet {}"]},
        "Cifar-10": {"classes": ["frog"], "templates": ["a tiny {}"]},
    })  # fmt: skip
    assert evals_classes.load(f"{path}#Pets").texts(0) == ["a pet cat"]
    by_dataset = evals_classes.load(path, dataset="cifar10")
    assert by_dataset.texts(0) == ["a tiny frog"]
    assert by_dataset.origin.endswith("sets.json#Cifar-10")
    assert evals_classes.load(f"{path}#Pets", f"{path}#Cifar-10").texts(0) == ["a tiny cat"]
    with pytest.raises(UserError, match=r"none is called 'Petz'; did you mean 'Pets'\?"):
        evals_classes.load(f"{path}#Petz")


@pytest.mark.parametrize(
    ("classes", "templates", "message", "key"),
    [
        ("", None, "names no class", "eval.zero_shot.x.classes"),
        ("cat", "a photo", r"'a photo' in .*templates.txt has no", "eval.zero_shot.x.templates"),
        ("cat", "", "no list of templates", "eval.zero_shot.x.templates"),
        (None, None, "cannot read the file of classes", "eval.zero_shot.x.classes"),
    ],
)  # fmt: skip
def test_faults_name_file_and_key(tmp_path, classes, templates, message, key):
    class_file = tmp_path / "classes.txt"
    if classes is not None:
        class_file.write_text(classes)
    template_file = None
    if templates is not None:
        template_file = write(tmp_path, "templates.txt", templates)
    with pytest.raises(UserError, match=message) as caught:
        evals_classes.load(class_file, template_file, key="eval.zero_shot.x")
    assert caught.value.key == key


@pytest.mark.parametrize("text", ["[", "[1, 2]", "3", '{"a": 5}', '[""]'])
def test_malformed_json(tmp_path, text):
    with pytest.raises(UserError, match=r"c\.json"):
        evals_classes.load(write(tmp_path, "c.json", text))


def loaded(names, folders=None):
    return evals_classes.Prompts(tuple((name,) for name in names), ("{}",), folders, "c.json")


def names(of):
    return tuple(names[0] for names in of.classes)


def test_classes_follow_the_datasets_labels():
    # By folder, by equal words, by number, by position.
    by_folder = loaded(["fox", "hen"], ("n02", "n01"))
    assert names(by_folder.in_order_of(["n01", "n02"], "d")) == ("hen", "fox")
    by_words = loaded(["Red Fox", "hen"])
    assert names(by_words.in_order_of(["hen", "red_fox"], "d")) == ("hen", "Red Fox")
    by_number = loaded([f"c{i}" for i in range(11)])
    in_order = by_number.in_order_of(["0", "1", "10", "2"], "d")
    assert names(in_order) == ("c0", "c1", "c10", "c2")
    assert names(loaded(["fox", "hen"]).in_order_of(["n1", "n2"], "d")) == ("fox", "hen")
    assert names(loaded(["fox", "hen"]).in_order_of(None, "d")) == ("fox", "hen")
    subset = loaded(["fox", "hen", "owl"], ("a", "b", "c")).in_order_of(["c", "a"], "d")
    assert names(subset) == ("owl", "fox")


def test_a_class_of_several_names(tmp_path):
    path = write(tmp_path, "c.json", [["happy", "smiling"], "sad"])
    found = evals_classes.load(path, write(tmp_path, "t.txt", "a {} face\nso {c}"))
    assert found.texts(0) == ["a happy face", "so happy", "a smiling face", "so smiling"]
    assert found.texts(1) == ["a sad face", "so sad"]


def test_classes_that_do_not_fit_the_dataset():
    with pytest.raises(UserError, match=r"c\.json has 2 classes, dataset 'd' has 3 class folders"):
        loaded(["fox", "hen"]).in_order_of(["x", "y", "z"], "d")
    with pytest.raises(UserError, match=r"class folder 'n09' that c\.json does not name"):
        loaded(["fox", "hen"], ("n01", "n02")).in_order_of(["n01", "n09"], "d")


def test_shipped_templates_load(tmp_path):
    assert len(evals_classes.load(write(tmp_path, "c.txt", "hen"), SHIPPED).templates) == 7


def test_public_files(shared_data):
    folder = shared_data / "prompts"
    imagenet = evals_classes.load(
        folder / "imagenet_classes.json", folder / "imagenet_templates.json"
    )
    assert (len(imagenet.classes), len(imagenet.templates)) == (1000, 80)
    wnids = json.loads((folder / "imagenet_wnids.json").read_text())
    assert imagenet.in_order_of(wnids, "imagenet") == imagenet  # by position
    sets = json.loads((folder / "clip_prompts_26.json").read_text())
    for name, value in sets.items():
        found = evals_classes.load(f"{folder / 'clip_prompts_26.json'}#{name}")
        several = [v if isinstance(v, list) else [v] for v in value["classes"]]
        assert list(map(list, found.classes)) == several
        assert list(found.templates) == value["templates"]


# --- rows that name their class

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


def colour_prompts():
    return Prompts(CLASSES, ("{}",), folders=("Very_Red", "green", "BLUE"), origin="c.json")


def test_zero_shot_by_names():
    found = zero_shot.evaluate(predictor(), NamedColours(), colour_prompts())
    assert found.metrics["accuracy@1"] > 95
    swapped = NamedColours(words=("green", "very red", "blue"))
    assert zero_shot.evaluate(predictor(), swapped, colour_prompts()).metrics["accuracy@1"] < 50


def test_a_name_is_taken_as_it_stands_before_it_is_made_plain():
    numbers = Prompts((("C",), ("C++",)), ("{}",)).numbers()
    assert (numbers["C"], numbers["C++"]) == (0, 1)
    assert plain("Very_Red ") == "veryred"


def test_probe_by_names():
    config = schema.LinearProbe(regularisation=[0.1])
    train, valid = NamedColours(60, split="train"), NamedColours(60, seed=1)
    assert class_names(train, valid) == sorted(WORDS)
    found = linear_probe.evaluate(predictor(), train, valid, config)
    assert found.metrics["accuracy@1"] > 90
    others = NamedColours(60, seed=1, words=("very red", "teal", "azure"))  # not seen in training
    found = linear_probe.evaluate(predictor(), train, others, config)
    assert 10 < found.metrics["accuracy@1"] < 60


def test_rows_that_cannot_be_classified():
    source = NamedColours(6)
    source.words[2] = ("green", "blue")
    with pytest.raises(UserError, match=r"row 2 of dataset 'colours' names several .*green, blue"):
        zero_shot.evaluate(predictor(), source, colour_prompts())
    source.words[2] = "gren"
    with pytest.raises(UserError, match=r"'gren', which c\.json does not .* did you mean 'green'"):
        zero_shot.evaluate(predictor(), source, colour_prompts())
    source.words[2] = ()
    with pytest.raises(UserError, match="row 2 of dataset 'colours' has no label"):
        zero_shot.evaluate(predictor(), source, colour_prompts())
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
    found = zero_shot.evaluate(predictor(num_workers=1), valid, colour_prompts())
    assert found.metrics["accuracy@1"] > 95
    config = schema.LinearProbe(regularisation=[0.1])
    probed = linear_probe.evaluate(predictor(), train, valid, config)
    assert probed.metrics["accuracy@1"] > 90
