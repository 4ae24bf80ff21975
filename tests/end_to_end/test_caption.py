"""Captioning as a user runs it: training, resume, captions of a folder, adapters, mistakes."""

import json
import shutil
from html import escape

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing import event_accumulator

from engine.evals import captions
from tests.end_to_end.conftest import ROOT, SMALL, interrupted, mistake

KINDS = ("t5_cross", "causal")


def lines_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf8").splitlines()]


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


def test_evaluations_report_meteor(caption, launch, meteor):
    caption("eval.epoch_interval=1", "eval.captions.num_images=3")
    (row,) = (row for row in launch.rows() if "tiny/CIDEr" in row)
    assert 0 <= row["tiny/METEOR"] < 0.5 and row["tiny/tokenizer"] == "PTB by Java"


@pytest.mark.parametrize("kind", KINDS)
def test_a_config_is_evaluated(caption, launch, kind):
    done = caption(
        "eval.epoch_interval=1", "epoch=2", "eval.captions.num_examples=3", "log.tensorboard=true",
        kind=kind,
    )  # fmt: skip
    rows = [row for row in launch.rows() if "tiny/CIDEr" in row]
    run, row = launch.output / "tiny", rows[-1]
    assert [row["step"] for row in rows] == [4, 8]
    assert {"tiny/exact_match", "tiny/METEOR", "tiny/content_scene", "tiny/tokenizer"} <= row.keys()
    assert 0 <= row["tiny/exact_match"] <= 100

    names = {f"tiny.step_{step}.{form}" for step in (4, 8) for form in ("jsonl", "results.json")}
    assert {path.name for path in (run / "samples").iterdir()} == names
    told = lines_of(run / "samples" / "tiny.step_8.jsonl")
    assert len(told) == 16 and {"image_id", "caption", "references"} == told[0].keys()
    exact = sum(line["caption"].lower() in line["references"] for line in told)
    assert row["tiny/exact_match"] == pytest.approx(100 * exact / 16)
    results = json.loads((run / "samples" / "tiny.step_8.results.json").read_text())
    assert results == [{"image_id": int(t["image_id"]), "caption": t["caption"]} for t in told]

    page = (run / "report.html").read_text(encoding="utf8")
    assert page.count("<article>") == page.count("data:image/jpeg") == 3
    assert all(escape(line["caption"]) in page for line in told[:3] if line["caption"])
    assert f"<td>{row['tiny/tokenizer']}</td>" in page and "<figcaption>CIDEr<" in page
    events = event_accumulator.EventAccumulator(str(run))
    events.Reload()
    assert [event.step for event in events.Images("tiny/examples")] == [4, 8]

    kept = {path: path.read_bytes() for path in (run / "samples").iterdir()}
    again = caption("--mode=eval", kind=kind)
    assert "CIDEr" in done.stdout and "CIDEr" in again.stdout and "tokenizer" in again.stdout
    assert lines_of(run / "evaluations.jsonl")[-1]["tiny/CIDEr"] == row["tiny/CIDEr"]
    assert {path: path.read_bytes() for path in (run / "samples").iterdir()} == kept


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
    table.write_text("\n".join(lines[:4]) + "\n")
    datasets = json.dumps({"own": {"format": "csv", "root": str(own)}})
    names = ("data.train_name=[own]", "data.valid_name=[own]", "data.max_bad_fraction=0.5")
    few = ("data.batch_size=3", "epoch=2")
    exact = ("dist.precision=fp64", "model.image_encoder.param.norm_layer=groupnorm1")
    found = []
    for name, world in (("own", 1), ("own_three", 3)):  # with three a process has that row alone
        flags = (*names, *few, *exact, f"--nproc_per_node={world}", f"data.exp_name={name}")
        caption(f"data.datasets={datasets}", *flags)
        bad = lines_of(launch.output / name / "bad_samples.jsonl")
        assert {line["cause"] for line in bad} == {"no caption"}
        rows = [row for row in lines_of(launch.output / name / "metrics.jsonl") if "loss" in row]
        found.append([(row["loss"], row["samples_seen"], row["bad_samples"]) for row in rows])
    assert [row[1:] for row in found[0]] == [(2, 1), (4, 2)]
    assert found[1] == [pytest.approx(row, abs=1e-9) for row in found[0]]


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
    mistake(done, "model.image_encoder.init", "does not fit", "in the model")


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


def test_captions_of_a_folder(caption, launch, pictures, monkeypatch):
    caption()
    done = caption("--mode=generate", f"input={pictures}")
    made = launch.output / "tiny" / "captions"
    names = sorted(
        str(path.relative_to(pictures)) for path in pictures.rglob("*") if path.suffix != ".txt"
    )
    names = [name for name in names if (pictures / name).is_file() and "broken" not in name]
    told = lines_of(made / "captions.jsonl")
    assert [line["image_id"] for line in told] == names and len(names) == 5
    assert json.loads((made / "captions_coco.json").read_text()) == told
    page = (made / "captions.html").read_text(encoding="utf8")
    assert all(name in page for name in names) and page.count("data:image") == 5
    (bad,) = lines_of(made / "bad_samples.jsonl")
    assert "broken.jpg" in bad["key"]
    assert "1 image left out" in done.stdout + done.stderr

    before = (made / "captions.jsonl").read_text()
    monkeypatch.setattr(captions, "generate_texts", interrupted(captions.generate_texts))
    done = caption("--mode=generate", f"input={pictures}", "generate.batch_size=2")
    assert "SIGINT: 2 of 6 images done; the rest is left out" in done.stdout + done.stderr
    assert (made / "captions.jsonl").read_text() == before
    assert [line["image_id"] for line in lines_of(made / "partial" / "captions.jsonl")] == names[:2]


def test_best_of_n_by_a_clip_run(caption, launch, pictures, tmp_path):
    """And the same by one process and by two."""
    launch("epoch=1", "data.exp_name=clip", "eval.epoch_interval=null")
    caption("epoch=2", kind="t5_cross")
    clip = launch.output / "clip"
    flags = ("generate.method=best_of_n", "generate.num_samples=3", "dist.precision=fp64",
             f"generate.ranker.model={clip}")  # fmt: skip
    told = []
    for number in (1, 2):
        out = tmp_path / f"by{number}"
        world = [f"--nproc_per_node={number}"] if number > 1 else []
        caption(
            *flags, *world, "--mode=generate", f"input={pictures}", f"generate.output={out}",
            f"generate.batch_size={4 * number}", kind="t5_cross",
        )  # fmt: skip
        told.append(lines_of(out / "captions.jsonl"))
    for line, again in zip(*told, strict=True):
        cosines = line.pop("cosines")
        assert cosines == pytest.approx(again.pop("cosines"), abs=1e-5)
        assert line == again
        assert len(line["candidates"]) == len(cosines) == 3
        assert line["caption"] == line["candidates"][cosines.index(max(cosines))]

    for scorer, said in ((clip / "checkpoints" / "step_4", "the ranker: circular"), (None, None)):
        scored = caption(
            *flags, "--mode=eval", f"generate.scorer.model={scorer or 'null'}", kind="t5_cross"
        )
        row = lines_of(launch.output / "tiny" / "evaluations.jsonl")[-1]
        assert row.get("tiny/scorer") == said
        assert ("tiny/CLIPScore" in row) == (said is not None)
        assert (said or "tokenizer") in scored.stdout
