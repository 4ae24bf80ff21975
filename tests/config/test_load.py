import json
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config.explain import dotted_keys
from engine.config.load import load, load_with_places, resolved_yaml
from engine.config.schema import Config
from engine.errors import UserError

FILES = Path(__file__).parent / "files"


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes a file beside the others of a test and returns its name; messages then hold that."""
    monkeypatch.chdir(tmp_path)

    def write(text, name="run.yaml"):
        Path(name).write_text(text, encoding="utf8")
        return name

    return write


def faults(path, overrides=()):
    with pytest.raises(UserError) as caught:
        load(path, overrides)
    return str(caught.value).splitlines()


def test_fundamental_settings_mean_what_they_say():
    config = load(FILES / "fundamental.yaml")
    assert config.ckpt.dir == "./output"
    assert config.ckpt.step_interval == 2000
    assert config.data.exp_name == "your_exp_name"
    assert config.data.train_name == ["your_dataset_1", "your_dataset_2", "..."]
    assert config.data.valid_name == ["your_dataset_3", "your_dataset_4", "..."]
    assert (config.data.batch_size, config.data.batch_size_val) == (1024, 1024)
    assert config.transforms.train_transforms == ["random_resize_crop", "autoaug"]
    assert config.transforms.valid_transforms == ["resize", "center_crop"]
    assert (config.transforms.resize.size, config.transforms.center_crop.size) == (256, 224)
    assert config.transforms.random_resize_crop.size == 224
    assert config.transforms.random_resize_crop.scale == (0.6, 1.0)
    image, text = config.model.image_encoder, config.model.text_encoder
    assert (image.name, image.tag) == ("timm_modelzoo", "vit_base_patch16_224_in21k")
    assert (text.name, text.tag) == ("huggingface_modelzoo", "bert-base-uncased")
    for encoder in (image, text):
        assert encoder.embedding_dim == 768
        assert encoder.pretrained is True
        assert encoder.trainable is True
    assert config.model.projection.dim == 512
    assert config.loss.name == "NCE"
    assert config.optim.name == "torch.optim.AdamW"
    assert config.optim.param == {"betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.001}
    assert config.optim.lr.name == "cosine_schedule_with_warmup_min_lr_scale"
    assert (config.optim.lr.init, config.optim.lr.warmup_proportion) == (1e-4, 0.025)
    assert config.optim.lr.param == {"num_cycles": 0.5, "min_lr_scale": 0.1}


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("debias", {"data.train_type": "debias"}),
        ("mixup", {"loss.name": "MixUpNCE", "loss.mixup.beta": 0.1}),
        (
            "dga",
            {
                "runner.name": "clip_bsgs",
                "runner.stable_random": "step",
                "data.batch_size": 16384,
                "data.batch_size_train": 1024,
                "data.batch_size_val": 1024,
            },
        ),
        ("gather_backward", {"loss.nce_loss.gather_backward": True}),
        (
            "wandb",
            {"wandb.enable": True, "wandb.project": "your_proj", "wandb.entity": "your_entity"},
        ),
    ],
)
def test_incremental_settings_mean_what_they_say(file, expected):
    for path in (FILES / f"{file}.yaml", FILES / "all.yaml"):
        config = load(path)
        for key, value in expected.items():
            found = config
            for step in key.split("."):
                found = getattr(found, step)
            assert found == value, (path, key)


def test_every_fault_is_reported_at_once_with_its_place_and_remedy(write):
    write("data:\n  train_name: [a, b, a]\nloss: {nam: NCE}\n", "below.yaml")
    path = write(
        "base: below.yaml\n"
        "data:\n"
        "  batch_size_train: 512\n"
        "  batch_size_val: many\n"
        "batch_size: 3\n"
        "transforms:\n"
        "  resize: {size: [224, -1]}\n"
        "optim:\n"
        "  lr: {init: -1, warmup_proportion: true}\n"
        "  param: {fused: !!python/name:os.system ''}\n"
        "wandb:\n"
        "model:\n"
        "  text_encoder: {pool: frist}\n"
    )
    lines = faults(path, ["loss.nce_loss.gatherbackward=true"])
    expected = [
        ("below.yaml:2: data.train_name.2: ", "'a' is listed twice; keep one"),
        ("below.yaml:3: loss.nam: unknown key 'nam'; ", "did you mean 'name'?"),
        ("command line: loss.nce_loss.gatherbackward: unknown key ", "'gather_backward'?"),
        ("run.yaml:3: data.batch_size_train: ", "give at most 256, or a larger data.batch_size"),
        ("run.yaml:4: data.batch_size_val: needs a whole number, not 'many'; ", "256)"),
        ("run.yaml:5: batch_size: unknown key 'batch_size'; ", "elsewhere: data.batch_size, "),
        ("run.yaml:7: transforms.resize.size.1: needs a number above 0, not -1; ", "correct it"),
        ("run.yaml:9: optim.lr.init: needs a number above 0, not -1; ", "0.0001"),
        ("run.yaml:9: optim.lr.warmup_proportion: needs a number, not true; ", "0.0"),
        ("run.yaml:10: optim.param.fused: the tag !!python/name:os.system is refused", "tuple"),
        ("run.yaml:11: wandb: needs keys and values below it, not nothing; ", "leave the key out"),
        ("run.yaml:13: model.text_encoder.pool: needs 'first', ", "did you mean 'first'?"),
    ]
    assert len(lines) == len(expected), lines
    for line, (start, remedy) in zip(lines, expected, strict=True):
        assert line.startswith(start), line
        assert remedy in line, line


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("model: {text_encoder: {tag: 224}}", "needs text (quoted where it looks like a number)"),
        ("data: {train_name: flickr}", "data.train_name: needs a list, such as [a, b], not"),
        ("transforms: {center_crop: {size: [1]}}", "size: needs a whole number or a list of 2"),
        ("optim: {groups: [{freeze: true}]}", "optim.groups.0.pattern: the key is missing; write"),
        ("optim: {lr: {init: .inf}}", "optim.lr.init: needs a finite number, not inf"),
        ("data: {batch_size: 1.5}", "data.batch_size: needs a whole number, not 1.5"),
        ("epoch: 0", "run.yaml:1: epoch: needs a number above 0, not 0"),
        ("optim: {lr: {warmup_steps: 5, warmup_proportion: 0.1}}", "warm-up is given twice"),
        ("loss: {temperature: {value: 0.001}}", "below its bound loss.temperature.min, 0.01"),
        ("loss: {nce_loss: {group_size: 0}}", "needs -1 or a number above 0, not 0"),
        ("loss: {sigmoid_loss: {group_size: -2}}", "needs -1 or a number above 0, not -2"),
        ("dist: {device: cpu, backend: nccl}", "dist.backend: nccl needs GPUs"),
        ("transforms: {random_resize_crop: {scale: [1.0, 0.5]}}", "give [low, high] in order"),
        ("transforms: {text_augment: {mask: 0.7, delete: 0.7}}", "add up to 1.4; give shares"),
        ("transforms: {train_transforms: [random_crp]}", "did you mean 'random_crop'?"),
        ("data: {train_name: [coco], debias: {weights: {cocoo: 2}}}", "did you mean 'coco'?"),
        ("eval: {extra: [mine]}", "eval.extra.0: 'mine' is not the dotted name of a module"),
        (
            "data: {train_name: [coco], debias: {weights: {coco: 2}}}",
            "weights has no meaning there",
        ),
        ("data: {train_type: sequential, debias: {temperature: 2}}", "temperature has no meaning"),
        ("runner: {stable_random: no}", "needs 'none' or 'step', not 'no'"),
        ("Data: {batch_size: 3}", "run.yaml:1: Data: unknown key 'Data'; did you mean 'data'?"),
        ("- data", "run.yaml:1: the file must hold sections"),
    ],
)
def test_what_is_refused_and_how(write, text, line):
    (found,) = faults(write(text))
    assert line in found
    assert ";" in found


def test_a_rule_is_not_applied_to_faulty_keys(write):
    (line,) = faults(write("data: {batch_size: lots, batch_size_train: 512}"))
    assert "data.batch_size: needs a whole number" in line


def test_part_names_are_checked_against_the_files(write, monkeypatch):
    monkeypatch.setattr("engine.config.rules.names", lambda folder: {"nce": "nce", "NCE": "nce"})
    lines = faults(write("loss: {name: NCEE}"))
    assert "run.yaml:1: loss.name: there is no 'NCEE'; did you mean 'NCE'?" in lines


def test_base_files_are_merged_and_keep_their_lines(write, tmp_path):
    (tmp_path / "sub").mkdir()
    write("data:\n  batch_size: 8\n  train_name: [a]\nepoch: 3\n", "root.yaml")
    write("base: ../root.yaml\ndata:\n  train_name: [b, c]\n", "sub/middle.yaml")
    loaded = load_with_places(write("base: sub/middle.yaml\ndata:\n  batch_size_val: 4\n"))
    assert loaded.config.data.batch_size == 8
    assert loaded.config.data.train_name == ["b", "c"]
    assert loaded.config.data.batch_size_val == 4
    assert loaded.config.epoch.total == 3
    assert loaded.where("data.batch_size") == "root.yaml:2"
    assert loaded.where("data.train_name.1") == "sub/middle.yaml:3"
    assert loaded.where("data.batch_size_val") == "run.yaml:3"
    assert loaded.where("data.num_workers") == "run.yaml:2", "the section around it"
    assert loaded.where("loss.name") == "run.yaml", "set nowhere"


def test_base_files_in_a_circle_or_absent_are_refused(write):
    write("base: run.yaml\n", "other.yaml")
    (line,) = faults(write("base: other.yaml\n"))
    assert line.startswith("other.yaml:1: base: the files inherit from one another")
    (line,) = faults(write("\nbase: nowhere.yaml\n"))
    assert line == (
        "run.yaml:2: base: nowhere.yaml: No such file or directory; give the path of a YAML file"
    )
    (line,) = faults("absent.yaml")
    assert line.startswith("absent.yaml: No such file")
    (line,) = faults(write("base: [a]"))
    assert line == "run.yaml:1: base: must be a file's name; write base: other.yaml"


def test_overrides_are_yaml_and_win(write):
    loaded = load_with_places(
        write("data: {batch_size: 8}\noptim: {groups: [{pattern: a}, {pattern: b}]}\nepoch: 5\n"),
        [
            "data.batch_size=16",
            "data.train_name=[x, y]",
            "optim.lr.init=3e-4",
            "optim.param.betas=!!python/tuple [0.9, 0.95]",
            "optim.groups.1.freeze=true",
            "loss.mixup={beta: 0.5}",
            "data.exp_name='2024'",
            "model.image_encoder.tag=hf-hub:some/model",
            "ckpt.resume=",
            "epoch.total=7",
            "data.batch_size=32",
        ],
    )
    config = loaded.config
    assert config.data.batch_size == 32
    assert config.data.train_name == ["x", "y"]
    assert config.optim.lr.init == 3e-4
    assert config.optim.param["betas"] == (0.9, 0.95)
    assert [group.freeze for group in config.optim.groups] == [False, True]
    assert config.loss.mixup.beta == 0.5
    assert config.data.exp_name == "2024"
    assert config.model.image_encoder.tag == "hf-hub:some/model"
    assert config.ckpt.resume is None
    assert config.epoch.total == 7
    assert loaded.where("data.batch_size") == "command line"
    assert loaded.where("loss.mixup.beta") == "command line"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.batch_size", "'data.batch_size' is not an override; write section.key=value"),
        ("=3", "is not an override"),
        ("data..x=3", "is not an override"),
        ("data.train_name=[a", "command line: data.train_name: not valid YAML"),
        ("optim.param.x=!!python/object:os.x {}", "optim.param.x: the tag !!python/object:os.x"),
        ("data.batch_sise=3", "command line: data.batch_sise: unknown key"),
        ("loss.name.deep=3", "command line: loss.name: needs text"),
    ],
)
def test_faulty_overrides_name_the_command_line(write, override, message):
    (line,) = faults(write("loss: {name: NCE}"), [override])
    assert line.startswith("command line: ")
    assert message in line


def test_the_resolved_file_loads_to_the_same_configuration(write):
    config = load(FILES / "all.yaml", ["optim.groups=[{pattern: 'a|b'}]"])
    text = resolved_yaml(config)
    assert "base:" not in text
    assert text.count("!!python/tuple") == 1, "typed pairs are plain lists"
    again = load(write(text))
    assert again == config
    assert again.optim.param["betas"] == (0.9, 0.98)
    assert resolved_yaml(again) == text


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.sampled_from(
        ["1e-4", "no", "true", "012", "0x1", "1_000", "~", "2024-01-01", "a: b", "<<"]
    )
    | st.text(st.characters(exclude_categories=["Cs", "Cc"]))
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text("abc<", min_size=1).filter("<<".__ne__), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from(["lr", "x", "y z", "1", "no"]), VALUES))
def test_any_free_option_survives_the_resolved_file(tmp_path_factory, param):
    path = tmp_path_factory.getbasetemp() / "resolved.yaml"
    config = Config.model_validate({"optim": {"param": param}})
    path.write_text(resolved_yaml(config), encoding="utf8")
    assert load(path) == config


WRONG_SOMEWHERE = [
    *["null", "true", "-1", "0", "1.5", "9e99", ".nan", "99999999999999999999", "1.0", "-0.5"],
    *["x", "''", "2026-01-31", "[]", "[[]]", "[x]", "[1, 2, 3, 4, 5]", "[null]", "[{}]", "{}"],
]


@pytest.mark.parametrize("key", dotted_keys())
def test_each_key_refuses_each_kind_of_value_in_words(tmp_path, key):
    path = tmp_path / "any.yaml"
    path.write_text("loss: {name: NCE}\n")
    for value in WRONG_SOMEWHERE:
        try:
            load(path, [f"{key}={value}"])
        except UserError as error:
            for line in str(error).splitlines():
                assert line.startswith("command line: ") and "needs something else (" not in line, (
                    line
                )


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from([*dotted_keys(), "model.x", "y"]), VALUES, max_size=4))
def test_whatever_stands_anywhere_is_loaded_or_refused_in_words(tmp_path_factory, values):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text("loss: {name: NCE}\n")
    overrides = [f"{key}={flow(value)}" for key, value in values.items()]
    try:
        config = load(path, overrides)
    except UserError as error:
        for line in str(error).splitlines():
            assert line.startswith("command line: "), line
            assert "needs something else (" not in line, line
    else:
        path.write_text(resolved_yaml(config), encoding="utf8")
        assert load(path) == config


def flow(value):
    """One line of YAML for a plain value."""
    if isinstance(value, tuple):
        return "!!python/tuple " + flow(list(value))
    if isinstance(value, list):
        return "[" + ", ".join(map(flow, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)}: {flow(v)}" for k, v in value.items()) + "}"
    if isinstance(value, float) and value in (float("inf"), float("-inf")):
        return ".inf" if value > 0 else "-.inf"
    return json.dumps(value)


def test_a_decoder_that_is_not_installed_is_named_with_the_remedy(write, monkeypatch):
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    (line,) = faults(write("data: {decoder: simplejpeg}"))
    assert line.startswith("run.yaml:1: data.decoder: simplejpeg cannot be imported")
    assert "pip install 'vision-language-engine[fast]'" in line
    for other in ("auto", "pillow", "pillow_exact"):
        assert load(write(f"data: {{decoder: {other}}}")).data.decoder == other
    (line,) = faults(write("data: {decoder: turbo}"))
    assert "data.decoder" in line and "'simplejpeg'" in line
