"""What can be wrong with a captioning run: told in one line that names the key and its place."""

import json
import os
import shutil

import pytest

from tests.end_to_end.conftest import ROOT, mistake

VIT = "{tag: vit_tiny_patch16_224, param: {patch_size: 16, embed_dim: 32, depth: 1, num_heads: 2}}"
EVALUATED = "eval.epoch_interval=1"
BEST = "generate.method=best_of_n"
GENERATE = "--mode=generate"


@pytest.fixture
def places(tmp_path):
    """Folders by name: EMPTY; HUB, a model's without its weights; BROKEN, with unreadable images;
    TEXT is a file."""
    made = {name: tmp_path / name.lower() for name in ("EMPTY", "HUB", "BROKEN")}
    for folder in made.values():
        folder.mkdir()
    sizes = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64}
    (made["HUB"] / "config.json").write_text(json.dumps(sizes))
    (made["BROKEN"] / "a.jpg").write_bytes(b"\xff\xd8\xff no image")
    (made["BROKEN"] / "b.png").touch()
    (tmp_path / "text").write_text("no folder")
    return made | {"TEXT": tmp_path / "text", "NOWHERE": tmp_path / "nowhere"}


@pytest.fixture
def settings(tmp_path):
    """A configuration with an encoder of fixed positions, whose place in the file is known."""
    text = (ROOT / "configs/caption/shapes_causal.yaml").read_text()
    start, end = text.index("  image_encoder:"), text.index("  connector:")
    path = tmp_path / "settings.yaml"
    path.write_text(text[:start] + f"  image_encoder: {VIT}\n" + text[end:] + MORE)
    return path


MORE = """
generate:
  num_samples: 0
"""


def filled(flags, places):
    for name, place in places.items():
        flags = [flag.replace(f"={name}", f"={place}") for flag in flags]
    return flags


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        # names, sizes and weights of the model
        (["model.decoder.name=t5cross"], ["model.decoder.name", "t5_cross"]),
        (["model.decoder.name=/nowhere/at/all"], ["model.decoder.name", "/nowhere/at/all"]),
        (["model.decoder.max_length=65"], ["model.decoder.max_length", "65", "64 positions"]),
        (
            ["data.prompt.instruction=describe this picture", "model.decoder.max_length=4"],
            ["model.decoder.max_length", "within 4"],
        ),
        (
            ["model.decoder.tag=HUB", "model.decoder.pretrained=true"],
            ["model.decoder.tag", "/hub", "no file named model.safetensors"],
        ),
        (
            ["model.decoder.tag=EMPTY", "model.decoder.pretrained=true"],
            ["model.decoder.tag", "/empty"],
        ),
        (
            ["model.connector.name=identity", "model.decoder.config.n_embd=64"],
            ["model.connector.name", "128 wide", "takes 64", "linear"],
        ),
        (["model.connector.layer=0"], ["model.connector.layer"]),
        # what is trained on, and what trains
        (["data.prompt.template=plane"], ["data.prompt.template", "'plain'"]),
        (["data.prompt.template='{image}'"], ["data.prompt.template", "{image}"]),
        (["optim.groups=[{pattern: nothing_like_it, train: lora}]"], ["nothing_like_it"]),
        (["optim.keys_finetune=[conector]"], ["conector", "connector"]),
        # how texts are generated and judged
        (["generate.num_samples=0"], ["generate.num_samples", "above 0, not 0"]),
        (["generate.max_new_tokens=0"], ["generate.max_new_tokens", "above 0, not 0"]),
        ([EVALUATED, BEST], ["generate.ranker.model", "needs a model"]),
        (
            [EVALUATED, BEST, "generate.ranker.model=EMPTY"],
            ["generate.ranker.model", "/empty", "neither the folder of a clip run nor a CLIP"],
        ),
        ([EVALUATED, "generate.scorer.model=HUB"], ["generate.scorer.model", "/hub"]),
        # what is to be captioned
        ([GENERATE], ["generate.input", "input=DIR"]),
        ([GENERATE, "input="], ["command line: generate.input", "input=DIR"]),
        ([GENERATE, "input=7"], ["command line: input", "text", "7"]),
        ([GENERATE, "input=NOWHERE"], ["command line: generate.input", "no folder", "/nowhere"]),
        ([GENERATE, "input=TEXT"], ["command line: generate.input", "/text is a file"]),
        ([GENERATE, "input=EMPTY"], ["command line: generate.input", "no images", ".png"]),
        ([GENERATE, "input=BROKEN"], ["ckpt.resume", "no checkpoint in", "train first"]),
    ],
)
def test_a_mistake_is_told_before_anything_is_written(caption, launch, places, flags, told):
    mistake(caption(*filled(flags, places), code=2), *told)
    assert not launch.output.exists()


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (
            ["model.image_encoder.image_size=48"],
            ["command line: model.image_encoder.image_size", "32 × 32", "48 × 48"],
        ),
        (  # only evaluations have the wrong size
            [EVALUATED, "transforms.train_transforms=[random_resize_crop]",
             "transforms.random_resize_crop.size=16"],
            ["settings.yaml:22: model.image_encoder.image_size", "32 × 32", "16 × 16"],
        ),
    ],
)  # fmt: skip
def test_images_of_another_size_than_the_encoders(caption, launch, settings, flags, told):
    settings.write_text(settings.read_text().removesuffix(MORE))
    mistake(caption(*flags, cfg=settings, code=2), *told)
    assert not launch.output.exists()


def test_the_line_of_a_wrong_value_is_named(caption, settings):
    line = settings.read_text().splitlines().index("  num_samples: 0") + 1
    mistake(caption(cfg=settings, code=2), f"settings.yaml:{line}: generate.num_samples")


@pytest.fixture
def trained(caption):
    """``caption`` after a run of an epoch."""
    caption()
    return caption


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["input=BROKEN"], ["generate.input", "none of the 2 images", "truncated", "empty file"]),
        (["input=PICTURES", "generate.output=TEXT"], ["generate.output", "/text: File exists"]),
        (
            ["input=PICTURES", BEST, "generate.ranker.model=RUN"],
            ["command line: generate.ranker.model", "caption; one of --task=clip is needed"],
        ),
    ],
)
def test_mistakes_with_a_trained_run(trained, launch, places, pictures, flags, told):
    more = {"PICTURES": pictures, "RUN": launch.output / "tiny"}
    mistake(trained(GENERATE, *filled(flags, places | more), code=2), *told)


def test_a_task_without_texts_to_generate(launch, pictures):
    done = launch("--mode=generate", f"input={pictures}", code=2)
    mistake(done, "--mode=generate", "--task=clip", "--task=caption")


def test_odd_files_of_a_folder_are_named_and_odd_names_are_kept(trained, launch, pictures):
    odd = pictures.parent / "odd"
    odd.mkdir()
    drawn = next(pictures.glob("a.*"))
    names = ["<b>&.jpg", "two\nlines.jpg", os.fsdecode(b"\xff.jpg"), "日本.jpg"]
    for name in (*names, ".hidden.jpg"):
        shutil.copy(drawn, odd / name)
    (odd / ".cache").mkdir()
    shutil.copy(drawn, odd / ".cache" / "x.jpg")
    (odd / "folder.jpg").mkdir()
    (odd / "link.png").symlink_to("/nowhere")
    os.mkfifo(odd / "pipe.png")
    done = trained(GENERATE, f"input={odd}")
    made = launch.output / "tiny" / "captions"
    for _ in range(2):  # a second time nothing is doubled
        lines = (made / "captions.jsonl").read_text(encoding="utf8").splitlines()
        assert [json.loads(line)["image_id"] for line in lines] == sorted(names)
        page = (made / "captions.html").read_text(encoding="utf8")
        assert "&lt;b&gt;&amp;.jpg" in page and "日本.jpg" in page and "4 images" in page
        bad = (made / "bad_samples.jsonl").read_text().splitlines()
        causes = {(row["key"], row["cause"]) for row in map(json.loads, bad)}
        assert causes == {("link.png", "missing"), ("pipe.png", "unreadable")}
        assert len(bad) == 2 and "2 images left out" in done.stdout
        done = trained(GENERATE, f"input={odd}")
