"""--mode=export as a user runs it: a run with adapters to ONNX and back to texts; mistakes."""

import json

import onnx
import pytest

from engine.export import run
from tests.end_to_end.conftest import mistake
from tests.end_to_end.test_caption import LORA


def test_a_run_with_adapters_says_the_same_in_onnx(caption, launch, drawn_data, capsys):
    flags = (
        f"optim.groups=[{', '.join(LORA)}]", "model.lora={rank: 2, alpha: 8}", "epoch=2",
        "optim.lr.init=0.05", "optim.lr.warmup_proportion=0.0", "data.decoder=pillow_exact",
    )  # fmt: skip
    caption(*flags, kind="t5_cross")
    images = drawn_data / "tiny" / "valid"
    caption("--mode=generate", f"input={images}", *flags, kind="t5_cross")
    made = launch.output / "tiny" / "captions" / "captions.jsonl"
    want = [json.loads(line) for line in made.read_text(encoding="utf8").splitlines()]
    folder = launch.output / "tiny" / "export" / "onnx"
    caption("--mode=export", *flags, "export.external_data=always", "export.opset=18",
            kind="t5_cross")  # fmt: skip
    capsys.readouterr()
    assert run.main([str(folder), *(str(images / one["image_id"]) for one in want)]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [one["caption"] for one in lines] == [one["caption"] for one in want]
    assert len(want) == 16 and any(one["caption"] for one in want)

    graph = onnx.load(folder / "decoder.onnx", load_external_data=False)
    assert graph.opset_import[0].version == 18
    assert not any("lora" in weight.name for weight in graph.graph.initializer)
    assert (folder / "decoder.onnx.data").is_file()
    (folder / "mine.txt").write_text("of mine")
    done = caption("--mode=export", *flags, kind="t5_cross", code=2)
    mistake(done, "export.output", "mine.txt", "clear this one")


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["export.format=onx"], ["export.format", "'onx'", "did you mean 'onnx'"]),
        (["export.opset=17"], ["export.opset", "at least 18"]),
        (["export.opset=24"], ["export.opset", "at most 23"]),
        ([], ["ckpt.resume", "no checkpoint", "train first"]),
    ],
)
def test_mistakes_are_told_before_anything_is_written(launch, flags, told):
    done = launch("--mode=export", *flags, code=2)
    mistake(done, *told)
    assert not launch.output.exists()


def test_a_pipeline_that_cannot_be_told_is_a_mistake_and_others_are_written(launch):
    launch("epoch=1", "eval.epoch_interval=null")
    done = launch("--mode=export", "transforms.valid_transforms=[random_flip, resize]", code=2)
    mistake(done, "transforms.valid_transforms", "random_flip cannot be repeated")
    assert not (launch.output / "tiny" / "export").exists()
    launch("--mode=export", "export.format=hf")
    made = {path.name for path in (launch.output / "tiny" / "export" / "hf").iterdir()}
    assert {"image_encoder", "text_encoder", "projections.safetensors", "README.md"} <= made
