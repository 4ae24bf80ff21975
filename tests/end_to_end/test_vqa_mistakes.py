"""What is wrong with a user's questions, through launch.py: named and counted, or one message."""

import json

import numpy as np
import pytest
from PIL import Image

from tests.end_to_end.conftest import ROOT, mistake

CFG = ROOT / "tests/end_to_end/vqa.yaml"
ASKED = {"from": "human", "value": "<image>\nWhat is it?"}
SAID = {"from": "gpt", "value": "A scene."}
BROKEN = {  # by cause: a sample, and what is said of it
    "image count": (
        {"image": "0.png", "conversations": [{**ASKED, "value": "<image> or <image>?"}, SAID]},
        "2 <image> in the text, 1 given",
    ),
    "malformed": (
        {"image": "0.png", "conversations": [ASKED, {**ASKED, "value": "Well?"}, SAID]},
        "turn 2 is human's, as the one before it is",
    ),
    "missing": ({"image": "nowhere.png", "conversations": [ASKED, SAID]}, "train/nowhere.png"),
    "answer too long": (
        {"image": "0.png", "conversations": [ASKED, {**SAID, "value": "long " * 99}]},
        "495 tokens, model.decoder.max_length 300",
    ),
}
SOUND = 10  # rows


@pytest.fixture
def vqa(launch, tmp_path):
    """launch.py --task=vqa on conversations, the last of which are broken."""
    root = tmp_path / "talks"
    (root / "train").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for n in range(3):
        pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "train" / f"{n}.png")
    options = {
        "talks": {
            "format": "llava", "root": str(root), "valid_anno": "train.json",
            "valid_images": "train",
        }
    }  # fmt: skip
    small = [
        "--task=vqa", f"data.datasets={json.dumps(options)}", "data.train_name=[talks]",
        "data.batch_size=4", "data.batch_size_val=4", "epoch=1",
    ]  # fmt: skip

    def started(*flags, broken=(), code=0):
        rows = [{"image": f"{n % 3}.png", "conversations": [ASKED, SAID]} for n in range(SOUND)]
        rows += [BROKEN[cause][0] for cause in broken]
        named = [{"id": f"talk {n}", **row} for n, row in enumerate(rows)]
        (root / "train.json").write_text(json.dumps(named), encoding="utf8")
        return launch(*small, *flags, cfg=CFG, code=code)

    return started


@pytest.mark.parametrize("cause", BROKEN)
def test_more_of_them_than_allowed_stop_a_run_and_are_named(vqa, cause):
    done = vqa("data.valid_name=[]", broken=[cause], code=2)
    message = done.stderr.partition("data.max_bad_fraction: ")[2].splitlines()
    assert message[0].startswith(f"1 of 11 samples read cannot be used (1 {cause}), more than")
    assert f"(row {SOUND}): {cause}: " in message[1] and BROKEN[cause][1] in message[1]
    assert "bad_samples.jsonl. Repair or remove them" in message[2] and len(message) == 3


def test_fewer_are_left_out_of_training_and_evaluation_named_and_counted(vqa, launch):
    done = vqa("data.valid_name=[talks]", "data.max_bad_fraction=0.5", broken=BROKEN)
    assert "4 of 14 samples read were left out (1 " in done.stdout
    for cause in BROKEN:
        assert f"1 {cause}" in done.stdout.partition("samples read were left out")[2]
    bad = [json.loads(row) for row in (launch.output / "asked/bad_samples.jsonl").open()]
    assert {row["cause"]: row["index"] - SOUND for row in bad} == {
        cause: number for number, cause in enumerate(BROKEN)
    }
    assert all(BROKEN[row["cause"]][1] in row["detail"] for row in bad)
    # an answer's length does not matter where it is only held against what is said
    told = "talks: 3 rows left out: 1 image count, 1 malformed, 1 missing (talks 0.png"
    assert told in done.stdout + done.stderr
    assert len((launch.output / "asked/samples/talks.step_4.jsonl").read_text().splitlines()) == 11


def test_where_nothing_can_be_used_it_is_said_before_training(vqa, launch):
    entries = [{"conversations": [SAID, SAID]}]
    path = launch.output.parent / "talks" / "train.json"
    vqa("--mode=check")
    path.write_text(json.dumps(entries), encoding="utf8")
    options = {"talks": {"format": "llava", "root": str(path.parent)}}
    done = launch("--task=vqa", f"data.datasets={json.dumps(options)}", "data.train_name=[talks]",
                  cfg=CFG, code=2)  # fmt: skip
    mistake(done, "no sample of", "train.json can be used", "turn 2 is gpt's, as the one before")


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("{what}", ["data.prompt.template", "{what}", "{images}"]),
        ("FILE", ["data.prompt.template", "mine.yaml", "'mine'", "{anser}", "{answer}"]),
    ],
)
def test_a_template_with_unknown_fields(vqa, launch, tmp_path, template, told):
    path = tmp_path / "mine.yaml"
    path.write_text('mine: {input: "{question}", target: "{anser}"}\n', encoding="utf8")
    template = template.replace("FILE", str(path))
    done = vqa(f"data.prompt.template={json.dumps(template)}", code=2)
    mistake(done, *told)
    assert not launch.output.exists()
