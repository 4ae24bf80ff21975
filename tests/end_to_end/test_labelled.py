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
    # Colours are told apart by a linear map of almost any features
    assert scored["colours_probe/accuracy@1"] > 60


def test_linear_probe_of_a_run_is_a_task(launch, classes):
    launch("epoch=1")
    launch(
        "--task=linear_probe", "--exp_name=probe", *settings(classes)[::2],
        f"model.image_encoder.init={launch.output / 'tiny'}",
    )  # fmt: skip
    text = (launch.output / "probe" / "evaluations.jsonl").read_text()
    found = json.loads(text.splitlines()[-1])
    assert found["colours_probe/accuracy@1"] > 60


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
