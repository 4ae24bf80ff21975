"""A user's mistakes: one clear message each, exit code 2, and nothing written."""

import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import launch as launcher
from tests.end_to_end.conftest import TINY


@pytest.fixture
def run(drawn_data, tmp_path, capsys):
    """launch.py in this process: (exit code, what it printed); its output folder is run.output."""
    output = tmp_path / "output"

    def started(*flags, cfg=TINY, data=drawn_data):
        argv = ["--task=clip", f"--cfg={cfg}", f"data.data_path={data}", f"ckpt.dir={output}"]
        code = launcher.main([*argv, *flags])
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    started.output = output
    return started


@pytest.fixture
def folder(drawn_data, tmp_path, run):
    """A CSV dataset of one's own, 'own', copied from the drawn one."""
    run("--mode=check")  # draws it
    copied = tmp_path / "data" / "own"
    shutil.copytree(drawn_data / "tiny", copied)
    (copied / "shapes.json").unlink()
    return copied


OWN = ("data.train_name=[own]", "data.valid_name=[own]")


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["optim.lr.innit=1"], ["optim.lr.innit", "init", "command line"]),
        (["data.batch_size=many"], ["data.batch_size", "many"]),
        (["data.train_name=[nowhere]"], ["nowhere", "data.train_name", "tiny"]),
        (["data.batch_size=4000"], ["4000", "48"]),
        (["ckpt.resume=/nowhere/at/all"], ["/nowhere/at/all", "ckpt.resume"]),
        (["loss.name=NCEE"], ["NCEE", "NCE"]),
        (["model.image_encoder.tag=vit_tinny"], ["vit_tinny"]),
        (["model.image_encoder.embedding_dim=999"], ["999", "32"]),
        (["optim.name=torch.optim.Adamm"], ["Adamm", "Adam"]),
        (["optim.param.betta=1"], ["betta", "betas"]),
        (["transforms.train_transforms=[resise]"], ["resise", "resize"]),
        (["data.train_name=[tiny, tiny]"], ["tiny", "twice"]),
        (["runner.name=dga", "data.batch_size_train=24"], ["batch_size_train", "24", "12"]),
        (["optim.groups=[{pattern: nothing_like_it}]"], ["nothing_like_it"]),
        (["data.debias.weights={tiny: 2}"], ["data.debias.weights", "'shuffle'", "debias"]),
        (["data.datasets.tiny.cap=0"], ["data.datasets.tiny.cap", "'tiny'", "a number above 0"]),
        (["data.datasets.tiny.length=50"], ["data.datasets.tiny.length", "48", "50"]),
        (
            ["data.train_type=debias", "data.datasets.tiny.cap=11"],
            ["data.batch_size", "12", "tiny has 11 samples", "data.debias.allow_repeats"],
        ),
        (["data.datasets.tiny.cap=11"], ["data.batch_size", "12", "11 samples"]),
        (
            ["data.datasets.all={format: concat, parts: [tiny, tinny]}", "data.train_name=[all]"],
            ["data.datasets.all.parts", "'tinny'", "did you mean 'tiny'"],
        ),
        (["data.valid_name=[tinny]"], ["data.valid_name", "'tinny'", "did you mean 'tiny'"]),
    ],
)
def test_a_mistake_in_the_configuration(run, flags, told):
    code, printed = run(*flags)
    assert_one_message(code, printed, told)
    assert not run.output.exists()


def assert_one_message(code, printed, told):
    """Exit code 2, and nothing printed but one line that says all of it."""
    assert code == 2, printed
    assert len(printed.strip().splitlines()) == 1, printed
    for word in told:
        assert word in printed


@pytest.fixture
def colours(drawn_data):
    """Labelled images, and files of classes and templates with a fault each."""
    root = drawn_data / "bad_colours"
    for split in ("train", "valid"):
        for name in ("red", "blue"):
            (root / split / name).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), name).save(root / split / name / "0.png")
    for name, text in {
        "two.txt": "red\nblue\n", "three.txt": "red\nblue\ngreen\n", "other.txt": "a\nb\nc\n",
        "empty.txt": "", "blank.txt": "\n \n", "empty.json": "", "list.json": "[]",
        "plain.txt": "a photo of a {}\njust a photo\n",
    }.items():  # fmt: skip
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("chosen", "told"),
    [
        ({"classes": "empty.txt"}, ["colours.classes", "empty.txt names no class"]),
        ({"classes": "blank.txt"}, ["colours.classes", "blank.txt names no class"]),
        ({"classes": "list.json"}, ["colours.classes", "list.json names no class"]),
        ({"classes": "empty.json"}, ["colours.classes", "empty.json is not JSON"]),
        ({"classes": "absent.txt"}, ["colours.classes", "absent.txt"]),
        ({"classes": "other.txt"}, ["other.txt has 3 classes", "2 class folders"]),
        ({"templates": "plain.txt"}, ["colours.templates", "'just a photo'", "no {}"]),
        ({"templates": "empty.txt"}, ["colours.templates", "no list of templates"]),
        ({"dataset": "colors"}, ["colours.dataset", "'colors'", "did you mean 'colours'"]),
    ],
)
def test_a_mistake_in_what_is_evaluated_is_told_before_training(run, colours, chosen, told):
    asked = {"dataset": "colours", "classes": "two.txt", **chosen}
    paths = {key: name if key == "dataset" else str(colours / name) for key, name in asked.items()}
    code, printed = run(
        f"data.datasets.colours={{format: imagefolder, root: {colours}}}",
        f"eval.zero_shot.colours={json.dumps(paths)}",
    )
    assert_one_message(code, printed, ["eval.zero_shot.colours", *told][-len(told) :])
    assert not run.output.exists()


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["model.init=RUN", "model.projection.dim=24"], ["model.init", "16", "24"]),
        (["ckpt.resume=RUN", "model.projection.dim=24"], ["ckpt.resume", "16", "24"]),
        (
            ["ckpt.resume=RUN", "--mode=eval", "model.image_encoder.param.depth=2"],
            ["ckpt.resume", "image_encoder.model.blocks.1", "model.image_encoder.param"],
        ),
        (
            ["model.image_encoder.init=RUN", "model.image_encoder.param.embed_dim=64"],
            ["model.image_encoder.init", "1×1×32 in the checkpoint, 1×1×64 in the model"],
        ),
        (
            ["model.text_encoder.init=RUN", "model.text_encoder.config.num_hidden_layers=2"],
            ["model.text_encoder.init", "missing in the checkpoint: ", "encoder.layer.1"],
        ),
        (["model.init=FOREIGN"], ["model.init", "not in the model: foo.weight"]),
        (["model.image_encoder.init=FOREIGN"], ["model.image_encoder.init", "it has foo"]),
        (["ckpt.resume=FOREIGN"], ["foreign.safetensors", "weights only", "step_N"]),
    ],
)
def test_weights_of_another_model(run, other_run, tmp_path, flags, told):
    save_file({"foo.weight": torch.zeros(3)}, tmp_path / "foreign.safetensors")
    places = {"RUN": str(other_run), "FOREIGN": str(tmp_path / "foreign.safetensors")}
    for word, place in places.items():
        flags = [flag.replace(f"={word}", f"={place}") for flag in flags]
    code, printed = run("--exp_name=another", *flags)
    assert_one_message(code, printed, told)
    assert not (run.output / "another").exists()


@pytest.fixture(scope="module")
def other_run(drawn_data, tmp_path_factory):
    """The folder of a finished run."""
    output = tmp_path_factory.mktemp("other")
    argv = [f"--cfg={TINY}", f"data.data_path={drawn_data}", f"ckpt.dir={output}", "epoch=1"]
    assert launcher.main(["--task=clip", *argv, "eval.epoch_interval=null"]) == 0
    return output / "tiny"


@pytest.mark.parametrize(
    ("before", "now", "told"),
    [
        ({"cap": 24}, {"cap": 24, "cap_seed": 1}, ["'cap': 24", "'cap_seed': 1"]),
        ({"captions": "random"}, {}, ["'captions': 'random'", "None now"]),
        ({"cap": 24, "repeat": 2}, {}, ["'repeat': 2"]),
    ],
)
def test_resume_with_other_rows(run, before, now, told):
    """As many rows as before, but others."""

    def flags(options):
        return [f"data.datasets.tiny.{name}={value}" for name, value in options.items()]

    assert run("epoch=1", "eval.epoch_interval=null", *flags(before))[0] == 0
    code, printed = run("epoch=2", *flags(now))
    assert code == 2, printed
    for word in ("rows chosen of data.datasets", *told):
        assert word in printed


def test_missing_config_file(run, tmp_path):
    code, printed = run(cfg=tmp_path / "absent.yaml")
    assert code == 2 and "absent.yaml" in printed


def test_python_object_tag_is_refused(run, tmp_path):
    path = tmp_path / "evil.yaml"
    path.write_text("epoch: !!python/object/apply:os.system ['touch pwned']\n")
    code, printed = run(cfg=path)
    assert code == 2 and "evil.yaml:1" in printed and "python/object" in printed
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("picture,words\na.jpg,b\n", ["picture", "words", "train_anno.csv"]),
        ("", ["empty", "train_anno.csv"]),
        ("image,caption\n", ["train_anno.csv"]),
        ("image,caption\n../../etc/passwd.jpg,b\n", ["../../etc/passwd.jpg"]),
    ],
)
def test_a_broken_table(run, folder, text, told):
    (folder / "train_anno.csv").write_text(text)
    code, printed = run(*OWN, data=folder.parent)
    assert code == 2, printed
    for word in told:
        assert word in printed
    assert not run.output.exists()


def spoil(folder) -> dict[str, str]:
    """Plant one fault of each kind in the training images; name → cause."""
    images = folder / "train"
    good = (images / "000000.jpg").read_bytes()
    (images / "000001.jpg").unlink()
    (images / "000002.jpg").write_bytes(good[: len(good) // 2])
    (images / "000003.jpg").write_bytes(b"")
    (images / "000004.jpg").write_bytes(b"this is not an image at all")
    Image.new("1", (20_000, 20_000)).save(images / "bomb.png")
    (images / "bomb.png").rename(images / "000005.jpg")
    return {
        "000001.jpg": "missing", "000002.jpg": "truncated", "000003.jpg": "empty file",
        "000004.jpg": "not an image", "000005.jpg": "too large",
    }  # fmt: skip


def test_bad_images_are_skipped_counted_and_named(run, folder):
    planted = spoil(folder)
    code, printed = run(*OWN, "data.max_bad_fraction=0.2", data=folder.parent)
    assert code == 0, printed
    lines = (run.output / "tiny" / "bad_samples.jsonl").read_text().splitlines()
    found = {row["key"]: row["cause"] for row in map(json.loads, lines)}
    assert found == planted
    rows = (run.output / "tiny" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(rows[-2])["bad_samples"] == 2 * len(planted)  # two epochs


def test_too_many_bad_images_stop_the_run(run, folder):
    spoil(folder)
    code, printed = run(*OWN, data=folder.parent)
    assert code == 2
    for word in ("5 of 48", "missing", "000001.jpg", "data.max_bad_fraction"):
        assert word in printed


def test_pickled_checkpoint_is_refused(run, tmp_path):
    torch.save({"a": 1}, tmp_path / "model.pt")
    code, printed = run(f"ckpt.resume={tmp_path / 'model.pt'}")
    assert code == 2 and "pickle" in printed and "model.pt" in printed
    assert not run.output.exists()


def test_resume_with_another_model_shape(run):
    assert run()[0] == 0
    kept = (run.output / "tiny" / "config.yaml").read_bytes()
    code, printed = run("model.projection.dim=24")
    assert code == 2, printed
    for word in ("projection", "16", "24"):
        assert word in printed
    assert (run.output / "tiny" / "config.yaml").read_bytes() == kept


def test_resume_with_another_order_of_samples(run):
    assert run()[0] == 0
    code, printed = run("data.batch_size=8")
    assert code == 2 and "data.batch_size: 12 there, 8 now" in printed


def test_nan_loss_stops_and_names_the_step_and_samples(run):
    code, printed = run("optim.lr.init=1e30", "optim.lr.warmup_steps=0", "eval.epoch_interval=null")
    assert code == 1, printed
    for word in ("step", "not", "checkpoint", "tiny[", "on_nonfinite"):
        assert word in printed
    assert "Traceback" not in printed


def test_nan_losses_are_skipped_and_counted_where_asked(run):
    flags = ["optim.lr.init=1e30", "optim.lr.warmup_steps=0", "eval.epoch_interval=null"]
    code, printed = run(*flags, "runner.on_nonfinite=skip")
    assert code == 0, printed
    assert "skipped, 7 so far" in printed  # the first of eight steps was finite


def test_batch_that_the_processes_cannot_share(launch):
    printed = launch("data.batch_size=13", "--nproc_per_node=2", code=2).stderr
    assert printed.count("data.batch_size 13") == printed.count("2 processes") == 1
    assert not launch.output.exists()
