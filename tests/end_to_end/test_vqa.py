"""Questions as a user trains them: two stages, conversations with and without images, mistakes."""

import json
import re
import shutil

import pytest
from safetensors.torch import load_file

from tests.end_to_end.conftest import ROOT, SMALL, mistake

T5 = {
    "model_type": "t5", "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2,
    "num_decoder_layers": 1, "feed_forward_proj": "gated-gelu",
}  # fmt: skip
DRAWN = {"format": "shapes", "num_train": 48, "num_valid": 16, "image_size": 32}
ASKED = {"asked": {**DRAWN, "texts": "questions"}}


CAUSAL = ROOT / "configs/caption/shapes_causal.yaml"


@pytest.fixture
def vqa(launch):
    """launch.py --task=vqa on the shipped configuration of a stage, made small."""

    def started(*flags, stage=1, causal=False, code=0):
        small = ["data.exp_name=vqa", "--task=vqa"]
        if causal:
            small.append("model.decoder.config.n_positions=128")
            return launch(*SMALL, *small, *flags, cfg=CAUSAL, code=code)
        small.append(f"model.decoder.config={json.dumps(T5)}")
        if stage == 1:
            tokenizer = {"name": "bpe", "vocab_size": 300}
            small.append(f"model.decoder.tokenizer={json.dumps(tokenizer)}")
        else:
            asked = [f"data.datasets={json.dumps(ASKED)}", "data.train_name=[asked]"]
            small += [*asked, "data.valid_name=[]", "model.init=null"]
            small.append("model.decoder.max_length=100")
        cfg = ROOT / f"configs/vqa/shapes_stage{stage}.yaml"
        return launch(*SMALL, *small, *flags, cfg=cfg, code=code)

    return started


def test_the_second_stage_goes_on_from_the_first(vqa, launch):
    """With its weights and its tokenizer, whatever the second stage's texts are."""
    vqa("data.exp_name=first")
    again = ["data.exp_name=second", f"model.init={launch.output}/first", "optim.lr.init=1e-30"]
    vqa(*again, stage=2)
    first, second = (launch.output / name for name in ("first", "second"))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (first / "tokenizer" / file).read_bytes() == (
            second / "tokenizer" / file
        ).read_bytes()
    weights = [
        load_file(max(folder.glob("checkpoints/step_*")) / "model.safetensors")
        for folder in (first, second)
    ]
    for name, tensor in weights[0].items():
        if "running" not in name and "tracked" not in name:  # which hang on what was seen
            assert tensor.allclose(weights[1][name]), name
    vqa("data.exp_name=alone", stage=2)
    alone = (launch.output / "alone" / "tokenizer" / "tokenizer.json").read_bytes()
    assert alone != (first / "tokenizer" / "tokenizer.json").read_bytes()


def test_a_tokenizer_may_learn_from_other_datasets(vqa, launch):
    tokenizer = {"name": "bpe", "vocab_size": 500, "datasets": ["asked"]}
    datasets = {**ASKED, "tiny": {**DRAWN, "style": "flat"}}
    vqa(f"model.decoder.tokenizer={json.dumps(tokenizer)}", f"data.datasets={json.dumps(datasets)}")
    saved = json.loads((launch.output / "vqa" / "tokenizer" / "tokenizer.json").read_text())
    assert any("colour" in piece for piece in saved["model"]["vocab"])
    tokenizer["datasets"] = ["akt"]
    done = vqa(f"model.decoder.tokenizer={json.dumps(tokenizer)}", "data.exp_name=x", code=2)
    mistake(done, "model.decoder.tokenizer.datasets", "akt")


def test_check_tells_a_samples_prompt_and_target(vqa):
    told = vqa("--mode=check").stdout
    asked, said = re.search(
        r"# a sample, with 1 image\(s\)\nprompt: '<image>(.*)'\ntarget: '(.*)'", told
    ).groups()
    assert asked and said and (asked + said).startswith(("one ", "two ", "three ", "an image of "))
    v1 = ["data.prompt.template=t5_v1", "model.decoder.max_length=300"]
    told = vqa("--mode=check", *v1, stage=2).stdout
    assert "USER: <image>\\n" in told and "ASSISTANT: " in told


# --- a user's own conversations

TALK = [
    {"from": "human", "value": "What is it?\n<image>"}, {"from": "gpt", "value": "A scene."},
    {"from": "human", "value": "Sure?"}, {"from": "gpt", "value": "Yes."},
]  # fmt: skip
ALONE = [{"from": "human", "value": "One and one?"}, {"from": "gpt", "value": "Two."}]
TWO_MARKS = {"from": "human", "value": "<image> <image>"}
LONG = {"from": "gpt", "value": "x" * 300}
BROKEN = {
    "image count": {"image": "0.jpg", "conversations": [TWO_MARKS, TALK[1]]},
    "malformed": {"image": "0.jpg", "conversations": [TALK[0], TALK[2], TALK[1]]},
    "answer too long": {"image": "0.jpg", "conversations": [TALK[0], LONG]},
    "missing": {"image": "nowhere.jpg", "conversations": TALK},
}


@pytest.fixture
def talks(vqa, drawn_data, tmp_path):
    """A LLaVA folder: conversations about one, two or no images, and some that cannot be used."""
    vqa("--mode=check")  # draws the data
    root = tmp_path / "talks"
    (root / "train").mkdir(parents=True)
    for n, source in enumerate(sorted((drawn_data / "tiny" / "train").iterdir())[:4]):
        shutil.copy(source, root / "train" / f"{n}.jpg")
    rows = [{"image": f"{n % 4}.jpg", "conversations": TALK} for n in range(12)]
    rows += [{"conversations": ALONE} for _ in range(12)]
    rows += [{"image": ["0.jpg", "1.jpg"], "conversations": ALONE} for _ in range(6)]
    rows += list(BROKEN.values())
    (root / "train.json").write_text(json.dumps([{"id": str(n), **r} for n, r in enumerate(rows)]))
    options = {"talks": {"format": "llava", "root": str(root), "several_images": "all"}}
    return [
        f"data.datasets={json.dumps(options)}", "data.train_name=[talks]", "data.valid_name=[]",
        "data.max_bad_fraction=0.2", "model.decoder.tokenizer.name=bytes",
        "data.prompt.template=vqa_plain", "model.decoder.max_length=120",
        "data.train_type=shuffle",
    ]  # fmt: skip


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("decoder", ["t5", "causal"])
def test_conversations_of_any_number_of_images_train(vqa, launch, talks, decoder, world):
    """Batches are mixed and alone; what cannot be used is named and left out."""
    if world == 2:
        talks += ["--nproc_per_node=2"]
    vqa(*talks, "data.batch_size=4", stage=2, causal=decoder == "causal")
    bad = [json.loads(line) for line in (launch.output / "vqa/bad_samples.jsonl").open()]
    assert sorted(record["cause"] for record in bad) == sorted(BROKEN)
    losses = launch.losses("vqa")
    assert len(losses) == 9 and all(0 < loss < 100 for loss in losses)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["data.prompt.template=plane"], ["data.prompt.template", "did you mean 'plain'"]),
        (["data.prompt.template='{what}'"], ["data.prompt.template", "has the field {what}"]),
        (["model.decoder.name=t5_cross"], ["model.decoder.name", "take causal or t5"]),
        (["data.prompt.tokenize=raw"], ["data.prompt.tokenize", "clean"]),
    ],
)
def test_mistakes_are_told_in_a_line(vqa, flags, told):
    mistake(vqa(*flags, stage=2, code=2), *told)
