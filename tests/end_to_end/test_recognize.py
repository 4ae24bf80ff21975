"""Object recognition as a user starts it: training, evaluation, labels of a folder, mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from engine.generate import labels as label_search
from tests.end_to_end.conftest import ROOT, interrupted, mistake

DATA = {
    "objects": {"format": "shapes", "texts": "labels", "num_train": 48, "num_valid": 16,
                "image_size": 32}
}  # fmt: skip
SMALL = (
    "--task=recognize", "dist.precision=fp32", f"data.datasets={json.dumps(DATA)}",
    "data.train_name=[objects]",
    "data.valid_name=[objects]", "data.batch_size=12", "data.batch_size_val=8",
    "data.num_workers=0", "epoch=1", "log.tensorboard=false", "transforms.resize.size=[32, 32]",
    "dist.num_threads=1", "data.exp_name=tiny", "eval.epoch_interval=null",
    "ckpt.best_metric=null",
)  # fmt: skip


@pytest.fixture
def recognize(launch):
    def started(*flags, code=0):
        return launch(*SMALL, *flags, cfg=ROOT / "configs/recognize/shapes.yaml", code=code)

    return started


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf8").splitlines()]


def test_a_run_trains_is_scored_and_goes_on_where_it_was(recognize, launch) -> None:
    told = recognize("epoch=2", "eval.epoch_interval=2", "ckpt.step_interval=3")
    assert len(launch.losses()) == 8 and launch.losses()[-1] < launch.losses()[0]
    row = next(row for row in launch.rows() if "objects/exact_F1@2" in row)
    assert {"objects/exact_P@1", "objects/exact_R@5", "objects/mAP"} <= row.keys()
    assert 0 <= row["objects/mAP"] <= 100 and "mAP" in told.stdout
    samples = launch.output / "tiny" / "samples"
    line = lines_of(samples / "objects.step_8.jsonl")[0]
    assert len(line["references"]) == 2 and len(line["labels"]) <= 5
    probs = [label["prob"] for label in line["labels"]]
    assert probs == sorted(probs, reverse=True) and all(0 <= p <= 1 for p in probs)
    with Image.open(samples / "objects.step_8.curve.png") as curve:
        assert curve.size == (640, 640)
    assert "Examples: objects" in (launch.output / "tiny" / "report.html").read_text()

    recognize("--mode=eval", "generate.label_rows=2")  # in other portions, the same
    again = lines_of(launch.output / "tiny" / "evaluations.jsonl")[-1]
    assert again["objects/exact_F1@2"] == row["objects/exact_F1@2"]
    assert again["objects/mAP"] == pytest.approx(row["objects/mAP"], abs=1e-3)


def test_two_processes_compute_what_one_does(recognize, launch) -> None:
    norm = "model.image_encoder.param.norm_layer=groupnorm1"  # batch norm sees its rank alone
    flags = ("dist.precision=fp64", norm)
    recognize("data.exp_name=one", *flags)
    recognize("data.exp_name=two", "--nproc_per_node=2", *flags)
    pairs = zip(launch.losses("one"), launch.losses("two"), strict=True)
    assert max(abs(one - two) for one, two in pairs) <= 1e-9


def test_labels_of_a_folder_and_where_they_looked(
    recognize, launch, drawn_data, tmp_path, monkeypatch
) -> None:
    recognize("epoch=2")
    root = tmp_path / "images"
    (root / "more").mkdir(parents=True)
    for name, source in zip(
        ("a.jpg", "more/b.jpg"), sorted((drawn_data / "objects" / "valid").iterdir()), strict=False
    ):
        (root / name).write_bytes(source.read_bytes())
    (root / "broken.jpg").write_bytes(b"\xff\xd8\xff no image")
    told = recognize("--mode=generate", f"input={root}", "generate.attention=true",
                     "generate.num_labels=3")  # fmt: skip
    made = launch.output / "tiny" / "labels"
    lines = lines_of(made / "labels.jsonl")
    assert [line["image_id"] for line in lines] == ["a.jpg", "more/b.jpg"]
    assert "1 image left out" in told.stdout + told.stderr
    assert (made / "labels.html").read_text(encoding="utf8").count("data:image") == 2
    for line in lines:
        pictures = sorted((made / "attention" / line["image_id"]).iterdir())
        assert len(pictures) == len(line["labels"]) <= 3
        with Image.open(pictures[0]) as picture:
            assert picture.size == (448, 448 + 34)
    recognize("--mode=generate", f"input={tmp_path / 'none'}", code=2)

    # pictures of labels that an image no longer has go; others' files stay
    (made / "attention" / "a.jpg" / "03_earlier.png").write_bytes(b"")
    (made / "attention" / "a.jpg" / "mine.png").write_bytes(b"")
    recognize("--mode=generate", f"input={root}", "generate.attention=true",
              "generate.num_labels=2")  # fmt: skip
    left = [path.name for path in (made / "attention" / "a.jpg").iterdir()]
    assert "03_earlier.png" not in left and "mine.png" in left and len(left) <= 3

    # Ctrl-C: the batch that it comes in is written, and the earlier file stays
    before = (made / "labels.jsonl").read_text()
    monkeypatch.setattr(label_search, "recognise", interrupted(label_search.recognise))
    told = recognize("--mode=generate", f"input={root}", "generate.batch_size=1")
    assert "SIGINT: 1 of 3 images done; the rest is left out" in told.stdout + told.stderr
    assert (made / "labels.jsonl").read_text() == before
    assert [line["image_id"] for line in lines_of(made / "partial" / "labels.jsonl")] == ["a.jpg"]


def test_only_the_row_of_the_images_mark_trains_of_the_table(recognize, launch) -> None:
    groups = [
        {"pattern": "embed_tokens", "train": "rows", "tokens": ["<|image|>"]},
        {"pattern": "^(image_encoder|connector)", "train": "freeze"},
    ]
    flags = ("model.decoder.image_token=<|image|>", f"optim.groups={json.dumps(groups)}")
    recognize("data.exp_name=start", "data.train_steps=1", *flags)
    recognize("data.exp_name=rows", *flags)
    start, end = (
        load_file(launch.output / run / "checkpoints" / f"step_{step}" / "model.safetensors")
        for run, step in (("start", 1), ("rows", 4))
    )
    table = "decoder.model.model.embed_tokens."
    assert torch.equal(start[f"{table}weight"], end[f"{table}weight"])
    assert not torch.equal(start[f"{table}token_rows.rows_RD"], end[f"{table}token_rows.rows_RD"])
    assert end[f"{table}token_rows.rows_RD"].shape == (1, 128)
    recognize("data.exp_name=rows", "--mode=eval", *flags)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["generate.rank=best"], ["generate.rank", "'prob', 'ppl', 'sim', 'clip' or 'none'"]),
        (["generate.rank=clip", "eval.epoch_interval=1"],
         ["generate.ranker.model", "rank: clip needs a model"]),
        (["model.decoder.num_blocks=0"], ["model.decoder.num_blocks", "no block"]),
        (["generate.first_tokens=9999", "eval.epoch_interval=1"],
         ["generate.first_tokens", "9999 is more than the"]),
        (["generate.num_labels=9999", "eval.epoch_interval=1"],
         ["generate.num_labels", "9999 is more than the"]),
        (["eval.recognition.k=[1, 6]", "eval.epoch_interval=1"],
         ["eval.recognition.k", "k 6 are asked for, of 5 labels", "generate.num_labels"]),
        (["generate.method=best_of_n", "eval.epoch_interval=1"],
         ["generate.method", "best_of_n is for captions"]),
        (["data.labels.separator=:)"], ["data.labels.separator", "is not one token"]),
        (["eval.recognition.encoder=/none", "eval.epoch_interval=1"],
         ["eval.recognition.encoder", "'/none' is neither"]),
        (["model.decoder.name=causal", "model.decoder.mask=nxtp", "generate.method=greedy"],
         ["model.decoder.mask", "has no effect with decoder 'causal'"]),
    ],
)  # fmt: skip
def test_mistakes_are_told_before_training(recognize, launch, flags, told) -> None:
    mistake(recognize(*flags, code=2), *told)
    assert not (launch.output / "tiny" / "checkpoints").exists()


@pytest.fixture
def own_data(recognize, launch, tmp_path):
    """Writes a dataset of drawn images with a text each, and gives the flags that name it."""

    def write(column: str, **texts: list[str]) -> list[str]:
        recognize("--mode=check")  # draws the images
        own = tmp_path / "own"
        for split, told in texts.items():
            (own / split).mkdir(parents=True)
            rows = [f"image,{column}"]
            for number, text in enumerate(told):
                source = launch.data / "objects" / "train" / f"{number:06d}.jpg"
                (own / split / f"{number}.jpg").write_bytes(source.read_bytes())
                rows.append(f'{number}.jpg,"{text}"')
            (own / f"{split}_anno.csv").write_text("\n".join(rows) + "\n")
        datasets = json.dumps({"own": {"format": "csv", "root": str(own)}})
        return [f"data.datasets={datasets}", "data.train_name=[own]", "data.valid_name=[own]",
                "data.max_bad_fraction=0.5", "data.batch_size=4", "eval.epoch_interval=1",
                "data.exp_name=own", "eval.recognition.label_set=null"]  # fmt: skip

    return write


def test_captions_without_nouns_are_left_out_and_named(recognize, launch, own_data) -> None:
    pytest.importorskip("HanTa", reason="nouns need HanTa")
    train, valid = ["a dog on grass", "it runs quickly", "two cats"] * 4, ["a dog", "so be it"]
    flags = own_data("caption", train=train, valid=valid)
    told = recognize(*flags, "data.labels.source=nouns")
    causes = [line["cause"] for line in lines_of(launch.output / "own" / "bad_samples.jsonl")]
    assert causes == ["no label"] * 4
    assert "own: 1 rows left out: 1 no label (own 1.jpg)" in told.stdout + told.stderr
    line = lines_of(launch.output / "own" / "samples" / "own.step_3.jsonl")
    assert [one["references"] for one in line] == [["dog"]]


def test_a_label_with_the_separator_in_it_is_left_out_and_named(
    recognize, launch, own_data
) -> None:
    flags = own_data("labels", train=["dog|cat", "sky|paris, france", "tree"] * 4, valid=["dog"])
    recognize(*flags)
    bad = lines_of(launch.output / "own" / "bad_samples.jsonl")
    assert [one["cause"] for one in bad] == ["separator in label"] * 4
    assert "'paris, france' holds ','; choose another data.labels.separator" in bad[0]["detail"]
    recognize(*flags, "data.labels.separator=;", "data.exp_name=other")
    assert not (launch.output / "other" / "bad_samples.jsonl").exists()
