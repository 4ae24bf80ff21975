"""Class and template files in the forms in which they are published."""

import json
from pathlib import Path

import pytest

from engine.errors import UserError
from engine.evals import prompts

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
    loaded = prompts.load(write(tmp_path, name, value))
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
    loaded = prompts.load(classes, write(tmp_path, name, value))
    assert loaded.texts(0) == ["a hen.", "the hen"]


def test_several_sets_in_one_file(tmp_path):
    path = write(tmp_path, "sets.json", {
        "Pets": {"classes": ["cat"], "templates": ["a pet {}"]},
        "Cifar-10": {"classes": ["frog"], "templates": ["a tiny {}"]},
    })  # fmt: skip
    assert prompts.load(f"{path}#Pets").texts(0) == ["a pet cat"]
    by_dataset = prompts.load(path, dataset="cifar10")
    assert by_dataset.texts(0) == ["a tiny frog"]
    assert by_dataset.origin.endswith("sets.json#Cifar-10")
    assert prompts.load(f"{path}#Pets", f"{path}#Cifar-10").texts(0) == ["a tiny cat"]
    with pytest.raises(UserError, match=r"none is called 'Petz'; did you mean 'Pets'\?"):
        prompts.load(f"{path}#Petz")


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
        prompts.load(class_file, template_file, key="eval.zero_shot.x")
    assert caught.value.key == key


@pytest.mark.parametrize("text", ["[", "[1, 2]", "3", '{"a": 5}', '[""]'])
def test_malformed_json(tmp_path, text):
    with pytest.raises(UserError, match=r"c\.json"):
        prompts.load(write(tmp_path, "c.json", text))


def loaded(names, folders=None):
    return prompts.Prompts(tuple((name,) for name in names), ("{}",), folders, "c.json")


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
    found = prompts.load(path, write(tmp_path, "t.txt", "a {} face\nso {c}"))
    assert found.texts(0) == ["a happy face", "so happy", "a smiling face", "so smiling"]
    assert found.texts(1) == ["a sad face", "so sad"]


def test_classes_that_do_not_fit_the_dataset():
    with pytest.raises(UserError, match=r"c\.json has 2 classes, dataset 'd' has 3 class folders"):
        loaded(["fox", "hen"]).in_order_of(["x", "y", "z"], "d")
    with pytest.raises(UserError, match=r"class folder 'n09' that c\.json does not name"):
        loaded(["fox", "hen"], ("n01", "n02")).in_order_of(["n01", "n09"], "d")


def test_shipped_templates_load(tmp_path):
    assert len(prompts.load(write(tmp_path, "c.txt", "hen"), SHIPPED).templates) == 7


def test_public_files(shared_data):
    folder = shared_data / "prompts"
    imagenet = prompts.load(folder / "imagenet_classes.json", folder / "imagenet_templates.json")
    assert (len(imagenet.classes), len(imagenet.templates)) == (1000, 80)
    wnids = json.loads((folder / "imagenet_wnids.json").read_text())
    assert imagenet.in_order_of(wnids, "imagenet") == imagenet  # by position
    sets = json.loads((folder / "clip_prompts_26.json").read_text())
    for name, value in sets.items():
        found = prompts.load(f"{folder / 'clip_prompts_26.json'}#{name}")
        several = [v if isinstance(v, list) else [v] for v in value["classes"]]
        assert list(map(list, found.classes)) == several
        assert list(found.templates) == value["templates"]
