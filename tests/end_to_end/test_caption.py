"""Captioning as a user runs it: training, resume, captions of a folder, adapters, mistakes."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from tests.end_to_end.conftest import ROOT

KINDS = ("t5_cross", "causal")
DATA = {
    "tiny": {
        "format": "shapes", "style": "flat", "num_train": 48, "num_valid": 16, "image_size": 32,
    }
}  # fmt: skip
SMALL = (
    "--task=caption", f"data.datasets={json.dumps(DATA)}", "data.train_name=[tiny]",
    "data.valid_name=[tiny]", "data.batch_size=12", "data.batch_size_val=8", "data.num_workers=0",
    "epoch=1", "log.tensorboard=false", "transforms.resize.size=[32, 32]", "dist.num_threads=1",
    "data.exp_name=tiny", "eval.epoch_interval=null",
)  # fmt: skip


@pytest.fixture
def caption(launch):
    """launch.py --task=caption on a shipped configuration, made small."""

    def started(*flags, kind="causal", code=0):
        cfg = ROOT / f"configs/caption/shapes_{kind}.yaml"
        return launch(*SMALL, *flags, cfg=cfg, code=code)

    return started


def mistake(done, *told):
    """Exit code 2, and one line that says all of it."""
    printed = done.stdout + done.stderr
    assert done.returncode == 2, printed
    assert len(printed.strip().splitlines()) == 1, printed
    for word in told:
        assert word in printed


@pytest.fixture
def folder(drawn_data, caption, tmp_path):
    """Five images, two of them below a folder, one that is none, and a text."""
    caption("--mode=check")  # draws the data
    root = tmp_path / "images"
    (root / "more").mkdir(parents=True)
    drawn = sorted((drawn_data / "tiny" / "valid").iterdir())[:5]
    for name, source in zip(("b", "a", "c", "more/x", "more/b"), drawn, strict=True):
        shutil.copy(source, root / f"{name}{source.suffix}")
    (root / "broken.jpg").write_bytes(b"\xff\xd8\xff no image")
    (root / "notes.txt").write_text("no image either")
    return root


# --- training


@pytest.mark.parametrize("kind", KINDS)
def test_a_config_trains_and_goes_on_where_it_was(caption, launch, kind):
    flags = ("epoch=2", "ckpt.step_interval=3", "ckpt.keep_last=9")
    caption(*flags, kind=kind)
    whole, weights = launch.losses(), tensors(launch, "tiny", 8)
    assert len(whole) == 8 and whole[-1] < whole[0]
    for step in (4, 6, 8):
        shutil.rmtree(launch.output / "tiny" / "checkpoints" / f"step_{step}")
    done = caption(*flags, kind=kind)
    assert "from step 3" in done.stdout
    assert launch.losses()[-5:] == whole[3:]
    again = tensors(launch, "tiny", 8)
    assert again.keys() == weights.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in weights.items())


@pytest.mark.parametrize("kind", KINDS)
def test_a_config_is_evaluated(caption, launch, kind):
    done = caption("eval.epoch_interval=1", kind=kind)
    row = next(row for row in launch.rows() if "tiny/CIDEr" in row)
    assert {"tiny/exact_match", "tiny/content_scene"} <= row.keys()
    assert 0 <= row["tiny/exact_match"] <= 100
    again = caption("--mode=eval", kind=kind)
    assert "CIDEr" in done.stdout and "CIDEr" in again.stdout
    text = (launch.output / "tiny" / "evaluations.jsonl").read_text().splitlines()[-1]
    assert json.loads(text)["tiny/CIDEr"] == row["tiny/CIDEr"]


def test_two_processes_compute_what_one_does(caption, launch):
    norm = "model.image_encoder.param.norm_layer=groupnorm1"  # batch norm sees its rank alone
    flags = ("dist.precision=fp64", "epoch=2", norm)
    caption("data.exp_name=one", *flags)
    caption("data.exp_name=two", "--nproc_per_node=2", *flags)
    pairs = zip(launch.losses("one"), launch.losses("two"), strict=True)
    assert max(abs(one - two) for one, two in pairs) <= 1e-9


def test_captions_without_tokens_are_left_out_and_named(caption, launch, drawn_data, tmp_path):
    caption("--mode=check")  # draws the data
    own = tmp_path / "own"
    shutil.copytree(drawn_data / "tiny", own)
    (own / "shapes.json").unlink()
    table = own / "train_anno.csv"
    lines = table.read_text().splitlines()
    image, number, _, *rest = lines[3].split(",")
    lines[3] = ",".join([image, number, " ", *rest[-1:]])
    table.write_text("\n".join(lines) + "\n")
    datasets = json.dumps({"own": {"format": "csv", "root": str(own)}})
    names = ("data.train_name=[own]", "data.valid_name=[own]", "data.max_bad_fraction=0.1")
    caption(f"data.datasets={datasets}", *names, "data.exp_name=own")
    (line,) = (launch.output / "own" / "bad_samples.jsonl").read_text().splitlines()
    assert json.loads(line)["cause"] == "no caption"


def test_the_tower_of_a_clip_run_is_taken(caption, launch):
    cfg = ROOT / "configs/clip/shapes.yaml"
    launch(*SMALL, "--task=clip", "data.exp_name=clip", cfg=cfg)
    init = f"model.image_encoder.init={launch.output / 'clip'}"
    caption(init, "model.image_encoder.trainable=false")
    clip, after = tensors(launch, "clip", 4), tensors(launch, "tiny", 4)
    towers = [{n for n in each if n.startswith("image_encoder.")} for each in (clip, after)]
    assert towers[0] == towers[1] and len(towers[0]) > 10
    assert all(torch.equal(clip[name], after[name]) for name in towers[0])
    other = "model.image_encoder.param.channels=[8, 16, 32, 64]"
    done = caption(init, other, "data.exp_name=other", code=2)
    mistake(done, "model.image_encoder.init", "does not fit", "here")


# --- what trains

LORA = (
    r"{pattern: 'decoder\..*Attention\.(q|k|v|o)\.', train: lora}",
    "{pattern: ^connector, weight_decay: 0}",
    "{pattern: ., train: freeze}",
)


def tensors(launch, name, step):
    return load_file(launch.output / name / "checkpoints" / f"step_{step}" / "model.safetensors")


def test_lora_trains_adapters_alone(caption, launch):
    caption("data.exp_name=base", kind="t5_cross")
    base = tensors(launch, "base", 4)
    flags = (
        f"optim.groups=[{', '.join(LORA)}]", f"model.init={launch.output / 'base'}", "epoch=5",
        "model.lora={rank: 2, alpha: 4, rank_stabilised: true, dropout: 0.1}",
        "data.exp_name=adapted",
    )  # fmt: skip
    caption(*flags, kind="t5_cross")
    after = tensors(launch, "adapted", 20)
    adapters = {name for name in after if ".lora_" in name}
    changed = set()
    for name, tensor in after.items():
        if name not in adapters and not torch.equal(tensor, base[name.replace(".base_layer", "")]):
            changed.add(name)
    # two layers, self- and cross-attention, four layers each, two matrices
    assert len(adapters) == 2 * 2 * 4 * 2
    # A running statistic is no weight, and moves with what it sees.
    moved = {name for name in changed if "running_" not in name and "num_batches" not in name}
    assert moved and all(name.startswith("connector.") for name in moved)
    assert all(after[name].any() for name in adapters)

    folder = launch.output / "adapted"
    state = load_file(folder / "checkpoints" / "step_20" / "state.safetensors")
    trained = len(adapters) + len([name for name in after if name.startswith("connector.")])
    assert len([name for name in state if name.endswith("exp_avg")]) == trained
    saved = load_file(folder / "adapters" / "adapter_model.safetensors")
    assert saved.keys() == adapters | {n for n in after if n.startswith("connector.")}
    assert all(torch.equal(after[name], tensor) for name, tensor in saved.items())
    whole = folder / "checkpoints" / "step_20" / "model.safetensors"
    assert (folder / "adapters" / "adapter_model.safetensors").stat().st_size < (
        0.1 * whole.stat().st_size
    )
    table = (folder / "parameters.txt").read_text()
    assert "lora" in table and "frozen" in table
    losses = launch.losses("adapted")
    assert len(losses) == 20 and losses[-1] < losses[0]
    caption(*flags, kind="t5_cross")  # goes on from its own checkpoint: nothing is left to do
    assert launch.losses("adapted") == losses


def test_keys_finetune_leave_the_rest_as_it_was(caption, launch):
    caption("data.exp_name=base")
    caption(
        "data.exp_name=tuned", f"model.init={launch.output / 'base'}",
        "optim.keys_finetune=[connector, wte]",
    )  # fmt: skip
    base, after = tensors(launch, "base", 4), tensors(launch, "tuned", 4)
    changed = {name for name in base if not torch.equal(base[name], after[name])}
    moved = {name for name in changed if "running_" not in name and "num_batches" not in name}
    assert moved == {name for name in base if name.startswith("connector.") or ".wte." in name}


def test_check_prints_what_trains(caption, launch):
    done = caption("--mode=check", f"optim.groups=[{', '.join(LORA)}]", kind="t5_cross")
    rows = [line.split() for line in done.stdout.splitlines()]
    states = {(row[0], row[3]) for row in rows if len(row) > 3}
    assert {
        ("image_encoder", "frozen"), ("connector", "trained"), ("decoder", "lora"),
        ("decoder", "frozen"),
    } <= states  # fmt: skip
    assert "training compute" in done.stdout
    assert not launch.output.exists()


# --- captions of a folder


def lines_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf8").splitlines()]


def test_captions_of_a_folder(caption, launch, folder):
    caption()
    done = caption("--mode=generate", f"input={folder}")
    made = launch.output / "tiny" / "captions"
    names = sorted(
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.suffix != ".txt"
    )
    names = [name for name in names if (folder / name).is_file() and "broken" not in name]
    told = lines_of(made / "captions.jsonl")
    assert [line["image_id"] for line in told] == names and len(names) == 5
    assert json.loads((made / "captions_coco.json").read_text()) == told
    page = (made / "captions.html").read_text(encoding="utf8")
    assert all(name in page for name in names) and page.count("data:image") == 5
    (bad,) = lines_of(made / "bad_samples.jsonl")
    assert "broken.jpg" in bad["key"]
    assert "1 images left out" in done.stdout + done.stderr


def test_captions_are_the_same_by_one_process_and_by_two(caption, folder, tmp_path):
    caption("epoch=2")
    texts = []
    for world in (1, 2):
        out = tmp_path / f"by{world}"
        caption(
            "--mode=generate", f"input={folder}", f"generate.output={out}", "dist.precision=fp64",
            f"--nproc_per_node={world}",
        )  # fmt: skip
        texts.append((out / "captions.jsonl").read_text())
    assert texts[0] == texts[1]


def test_best_of_n_by_a_clip_run(caption, launch, folder):
    launch("epoch=1", "data.exp_name=clip", "eval.epoch_interval=null")
    caption("epoch=2", kind="t5_cross")
    flags = ("--mode=generate", f"input={folder}", "generate.method=best_of_n",
             "generate.num_samples=3")  # fmt: skip
    caption(*flags, f"generate.ranker.model={launch.output / 'clip'}", kind="t5_cross")
    told = lines_of(launch.output / "tiny" / "captions" / "captions.jsonl")
    assert len(told) == 5
    for line in told:
        assert len(line["candidates"]) == len(line["cosines"]) == 3
        best = line["cosines"].index(max(line["cosines"]))
        assert line["caption"] == line["candidates"][best]
    mistake(
        caption(*flags, kind="t5_cross", code=2), "generate.ranker.model", "needs a model",
    )  # fmt: skip
    mistake(
        caption(*flags, f"generate.ranker.model={folder}", kind="t5_cross", code=2),
        "generate.ranker.model", "neither the folder of a clip run nor a CLIP",
    )  # fmt: skip


# --- mistakes


def test_mistakes_in_what_is_to_be_captioned(caption, folder, tmp_path):
    generate = ("--mode=generate",)
    mistake(caption(*generate, code=2), "input=DIR")
    mistake(caption(*generate, "input=/nowhere", code=2), "no folder /nowhere")
    (tmp_path / "empty").mkdir()
    mistake(caption(*generate, f"input={tmp_path / 'empty'}", code=2), "no images", ".png")
    mistake(caption(*generate, f"input={folder}", code=2), "no checkpoint", "ckpt.resume")


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["model.decoder.name=t5cross"], ["model.decoder.name", "t5_cross"]),
        (["model.decoder.max_length=65"], ["model.decoder.max_length", "65", "64 positions"]),
        (
            ["data.prompt.instruction=describe this picture", "model.decoder.max_length=4"],
            ["model.decoder.max_length", "within 4"],
        ),
        (["data.prompt.template=plane"], ["data.prompt.template", "'plain'"]),
        (["data.prompt.template='{image}'"], ["data.prompt.template", "{image}"]),
        (
            ["model.connector.name=identity", "model.decoder.config.n_embd=64"],
            ["model.connector.name", "128 wide", "takes 64", "linear"],
        ),
        (["model.connector.layer=0"], ["model.connector.layer"]),
        (["optim.groups=[{pattern: nothing_like_it, train: lora}]"], ["nothing_like_it"]),
        (["optim.keys_finetune=[conector]"], ["conector", "connector"]),
        (
            ["eval.epoch_interval=1", "generate.method=best_of_n"],
            ["generate.ranker.model", "needs a model"],
        ),
        (
            ["eval.epoch_interval=1", "generate.method=best_of_n", "generate.num_samples=0"],
            ["generate.num_samples", "at least one"],
        ),
    ],
)
def test_a_mistake_is_told_before_training(caption, launch, flags, told):
    mistake(caption(*flags, code=2), *told)
    assert not launch.output.exists()


def test_a_decoder_without_weights_is_told(caption, launch, tmp_path):
    hub = tmp_path / "hub"
    hub.mkdir()
    sizes = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64}
    (hub / "config.json").write_text(json.dumps(sizes))
    done = caption(f"model.decoder.tag={hub}", "model.decoder.pretrained=true", code=2)
    mistake(done, "model.decoder.tag", str(hub), "no file named model.safetensors")


def test_images_of_another_size_than_the_encoders_are_told(launch):
    done = launch("model.image_encoder.image_size=48", code=2)
    printed = done.stdout + done.stderr
    assert "32 × 32" in printed and "48 × 48" in printed and "Traceback" not in printed
