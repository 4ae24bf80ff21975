"""Labelled images: zero-shot classification beside training, and a linear probe as its own task."""

import json

import numpy as np
import pytest
from PIL import Image

COLOURS = {"red": (200, 30, 30), "green": (30, 160, 60), "blue": (40, 60, 200)}


@pytest.fixture
def classes(drawn_data):
    """Class folders of noisy one-coloured images, and a file of the classes' names."""
    root = drawn_data / "colours"
    rng = np.random.default_rng(0)
    for split, number in (("train", 12), ("valid", 4)):
        for name, colour in COLOURS.items():
            folder = root / split / name
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(number):
                noise = rng.integers(-25, 25, (32, 32, 3))
                pixels = np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    (root / "classes.txt").write_text("\n".join(COLOURS))
    (root / "empty.txt").write_text("")
    (root / "templates.txt").write_text("an image of something\n")
    return root


def settings(root, classes="classes.txt", **more) -> list[str]:
    chosen = {"dataset": "colours", "classes": str(root / classes), **more}
    return [
        "data.datasets.colours.format=imagefolder",
        f"eval.zero_shot.colours={json.dumps(chosen)}",
        "eval.linear_probe.train=colours",
    ]


def test_training_is_scored_on_labelled_images_too(launch, classes):
    launch(*settings(classes), "epoch=1")
    scored = next(row for row in launch.rows() if "tiny/RSUM" in row)
    assert {"colours/accuracy@1", "colours_probe/accuracy@1"} <= set(scored)
    assert {"colours/accuracy@5", "colours/mean_per_class_accuracy"} <= set(scored)
    # Colours are told apart by a linear map of almost any features
    assert scored["colours_probe/accuracy@1"] > 60
    done = launch(*settings(classes), "epoch=1", "--mode=eval", "eval.bootstrap=20")
    again = evaluated(launch, "tiny")
    assert again["tiny/RSUM_low"] <= again["tiny/RSUM"] <= again["tiny/RSUM_high"]
    assert "RSUM_low" in done.stdout and "tiny/RSUM_low" not in scored
    figures = {name: value for name, value in scored.items() if "/" in name}
    assert {name: again[name] for name in figures} == figures


def evaluated(launch, exp_name) -> dict:
    text = (launch.output / exp_name / "evaluations.jsonl").read_text()
    return json.loads(text.splitlines()[-1])


def test_linear_probe_of_a_run_is_a_task(launch, classes):
    launch("epoch=1")
    probe = "--task=linear_probe", "--exp_name=probe", *settings(classes)[::2]
    launch(*probe, f"model.image_encoder.init={launch.output / 'tiny'}")
    found = evaluated(launch, "probe")
    assert found["colours_probe/accuracy@1"] > 60
    launch(*probe, "--mode=eval", f"ckpt.resume={launch.output / 'tiny'}")
    again = evaluated(launch, "probe")
    assert again["colours_probe/accuracy@1"] == found["colours_probe/accuracy@1"]
    assert "step_4" in again["checkpoint"]


def test_classes_that_a_csv_names(launch, classes):
    """Rows of image and class in place of class folders, for zero-shot and the probe."""
    for split in ("train", "valid"):
        files = sorted((classes / split).glob("*/*.png"))
        lines = [f"{file.parent.name}/{file.name},{file.parent.name}" for file in files]
        (classes / f"{split}_anno.csv").write_text("image,labels\n" + "\n".join(lines) + "\n")
    launch(*settings(classes), "epoch=1", "eval.epoch_interval=null")
    found = []
    for form in ("imagefolder", "csv"):
        launch(*settings(classes), f"data.datasets.colours.format={form}", "epoch=1", "--mode=eval")
        found.append({k: v for k, v in evaluated(launch, "tiny").items() if "colours" in k})
    assert len(found[0]) >= 6
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("change", "told"),
    [({"classes": "empty.txt"}, "empty.txt"), ({"templates": True}, "{}"), ({}, "absent")],
)
def test_what_is_wrong_with_classes_and_templates(launch, classes, change, told):
    if change.get("templates"):
        change = {"templates": str(classes / "templates.txt")}
    flags = settings(classes, **change)
    if not change:
        flags[1] = flags[1].replace('"dataset": "colours"', '"dataset": "absent"')
    done = launch(*flags, "epoch=1", code=2)
    assert told in done.stderr and "Traceback" not in done.stderr
