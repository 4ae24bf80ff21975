"""Exported folders against torch: the same features, captions, labels; and without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from engine.config.schema import Data, Generate, Prompt
from engine.data.text.tokenizer import load as load_tokenizer
from engine.errors import UserError
from engine.export import run
from engine.export.folder import MANIFEST
from engine.export.onnx_runner import OnnxCaptioner, OnnxClip, OnnxRecognizer, open_folder
from engine.generate.labels import encode_prompt, recognise
from engine.generate.texts import generate_texts
from engine.run import Run
from tests.export.models import SIZE, export, make, uint8
from tests.layers.test_layers import ROOT

FLICKR = ROOT.parent / "shared" / "data" / "flickr8k" / "valid"
TEXTS = ["a dog", "déjà vu – twice", "", "a text that is much too long for its encoder"]
ALONE = """
import sys
for name in ("torch", "transformers", "onnx", "onnxscript", "pydantic", "yaml", "pyarrow", "timm"):
    sys.modules[name] = None  # whoever imports it gets an ImportError
from engine.export.run import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Noise in four shapes, and photographs where there are any."""
    folder, random = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    found = []
    for number, (height, width) in enumerate([(40, 60), (90, 33), (32, 32), (64, 50)]):
        pixels = random.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
        image = Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST)
        found.append(folder / f"{number}.png")
        image.save(found[-1])
    photographs = sorted(FLICKR.iterdir())[:3] if FLICKR.is_dir() else []
    return [*found, *photographs]


Exported = tuple[Run, Any, Path]


def exported(name: str, tmp_path_factory: pytest.TempPathFactory, **sections: Any) -> Exported:
    trained = make(name, **sections)
    if name == "recognize":  # the separator comes easily
        trained.model.decoder.head()[0][trained.task.separator_id] *= 3  # type: ignore[union-attr, operator]
    folder = export(trained, tmp_path_factory.mktemp(name) / "onnx")
    return trained, open_folder(folder, threads=1, batch_size=3, verify=True), folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return exported("clip", tmp_path_factory)


@pytest.fixture(scope="module")
def caption(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    prompt = Prompt(template="instruction_answer", instruction="")
    return exported("caption", tmp_path_factory, data=Data(prompt=prompt))


@pytest.fixture(scope="module")
def recognize(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return exported("recognize", tmp_path_factory)


def pixels_of(model: Any, images: list[Path]) -> torch.Tensor:
    return uint8([model.preprocess.pixels(path) for path in images])


def test_features_are_torchs(clip: Exported, images: list[Path]) -> None:
    trained, model, _ = clip
    assert isinstance(model, OnnxClip)
    with torch.no_grad():
        want = trained.task.encode(
            trained.model, {"image_BCHW": pixels_of(model, images)}, "image"
        ).numpy()
        texts = trained.task.encode(trained.model, trained.task.tokenize(TEXTS), "text").numpy()
    got = model.embed_images(images)
    assert np.abs(got - want).max() < 1e-4 and got.dtype == np.float32
    assert np.abs(want - want[0]).max() > 0.1  # images differ
    assert np.abs(model.embed_texts(TEXTS) - texts).max() < 1e-4
    for one, text in enumerate(TEXTS):  # whatever stands beside it
        assert np.abs(model.embed_texts([text])[0] - texts[one]).max() < 1e-4
    assert model.embed_images([]).shape == model.embed_texts([]).shape == (0, 16)
    scale = float(trained.model.logit_scale.exp())  # type: ignore[operator, union-attr]
    probs = torch.from_numpy(scale * got @ texts.T).softmax(1).numpy()
    assert np.abs(model.probabilities(got, texts) - probs).max() < 1e-4
    model.manifest["logits"]["bias"] = -3.0
    alone = torch.from_numpy(scale * got @ texts.T - 3).sigmoid().numpy()
    assert np.abs(model.probabilities(got, texts) - alone).max() < 1e-4
    model.manifest["logits"]["bias"] = None


def test_captions_are_torchs(caption: Exported, images: list[Path]) -> None:
    trained, model, _ = caption
    assert isinstance(model, OnnxCaptioner)
    instructions = [trained.config.data.prompt.instruction] * len(images)
    want = generate_texts(
        trained.task, trained.model, pixels_of(model, images), instructions, Generate()
    )  # type: ignore[arg-type]
    assert model(images) == [text for (text,) in want]
    assert len(set(model(images))) > 1
    assert model.greedy(model.preprocess(images), max_new_tokens=5).shape == (len(images), 5)
    assert model(images, prompt="##Answer: ") == model(images) != model(images, prompt="?")
    with pytest.raises(UserError, match="leaves none for a caption"):
        model(images, prompt="x" * 40)


def test_a_caption_ends_at_its_end_whatever_the_others_do(
    caption: Exported, images: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, model, _ = caption
    plain = model.greedy(model.preprocess(images[:3]))
    assert plain.shape[1] == model.text["max_length"] - len(model.text["prompt_ids"])
    end = int(plain[0, 2])
    monkeypatch.setitem(model.text, "end_id", end)
    for row, ids in enumerate(model.greedy(model.preprocess(images[:3])).tolist()):
        said = plain[row].tolist()
        length = said.index(end) + 1 if end in said else len(said)
        assert ids[:length] == said[: len(ids)][:length]
        assert set(ids[length:]) <= {model.text["pad_id"]}


@pytest.mark.parametrize(
    ("top_k", "options"), [(5, {}), (12, {"rows": 5}), (3, {"first_tokens": 20})]
)
def test_labels_and_probabilities_are_torchs(
    recognize: Exported, images: list[Path], top_k: int, options: dict[str, int]
) -> None:
    trained, model, _ = recognize
    assert isinstance(model, OnnxRecognizer)
    section = Generate(
        method="one_shot", num_labels=top_k, first_tokens=options.get("first_tokens")
    )
    with torch.no_grad():
        seen = encode_prompt(trained.task, trained.model, pixels_of(model, images))  # type: ignore[arg-type]
        want = recognise(trained.task, trained.model, seen, section)  # type: ignore[arg-type]
    got = model(images, top_k, **options)
    assert any(len(labels) > 2 for labels in want)
    assert len({tuple(label.text for label in labels) for labels in want}) > 1
    for ours, torchs in zip(got, want, strict=True):
        assert [one.text for one in ours] == [one.text for one in torchs[:top_k]]
        probs = [(one.prob, other.prob) for one, other in zip(ours, torchs, strict=False)]
        assert all(abs(one - other) < 1e-5 for one, other in probs)


def test_as_many_labels_are_begun_as_the_run_begins(
    recognize: Exported, images: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    trained, model, _ = recognize
    told = model.manifest["labels"]
    section = trained.config.generate
    assert (told["num_labels"], told["first_tokens"]) == (section.num_labels, section.first_tokens)
    fewer, more = (model(images, 2, first_tokens=number) for number in (2, 20))
    assert model(images, 2) == fewer != more
    monkeypatch.setitem(told, "first_tokens", 20)
    assert model(images, 2) == more
    monkeypatch.setitem(told, "first_tokens", 1)
    assert model(images, 2) == fewer


def test_more_first_tokens_than_there_are_is_told(recognize: Exported, images: list[Path]) -> None:
    with pytest.raises(UserError, match=r"300 labels .* only 259 tokens"):
        recognize[1](images[:1], 300)


def test_the_manifest_says_what_a_stranger_needs(recognize: Exported) -> None:
    trained, _, folder = recognize
    manifest = json.loads((folder / MANIFEST).read_text())
    assert manifest["task"] == "recognize" and manifest["opset"] == 20 and manifest["step"] == 7
    assert manifest["image"]["size"] == [SIZE, SIZE]
    assert manifest["text"]["prompt_ids"] == trained.task.prompt_ids().tolist()
    decoder = manifest["graphs"]["decoder"]
    assert decoder["inputs"]["segment_ids"] == {"dtype": "int64", "shape": ["batch", "text_length"]}
    past, present = (decoder[k][f"{n}.self.0.key"]["shape"]
                     for k, n in (("inputs", "past"), ("outputs", "present")))  # fmt: skip
    assert past == ["batch", 2, "past_length", 16]
    assert set(present[2].split(" + ")) == {"image_length", "length", "past_length"}
    kept = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert kept == {*manifest["files"], MANIFEST}
    tokenizer = load_tokenizer(folder / manifest["text"]["tokenizer"])
    assert tokenizer.raw("a, b") == trained.task.tokenizer.raw("a, b")


def alone(*argv: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", ALONE, *map(str, argv), "--threads", "1"],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_the_runner_needs_no_torch(recognize: Exported, images: list[Path], tmp_path: Path) -> None:
    _, model, folder = recognize
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"\xff\xd8\xff no image")
    done = alone(folder, images[0], broken, *images[1:], "--top_k", "4", "--batch_size", "2")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 1, done.stderr
    assert [line["image"] for line in lines] == [str(p) for p in (images[0], broken, *images[1:])]
    assert "error" in lines.pop(1)
    for line, labels in zip(lines, model(images, 4), strict=True):
        assert [one["label"] for one in line["labels"]] == [one.text for one in labels]
        assert all(abs(one["prob"] - other.prob) < 1e-5
                   for one, other in zip(line["labels"], labels, strict=True))  # fmt: skip


def test_the_command_line_of_each_task(
    clip: Exported, caption: Exported, images: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    def lines(*argv: Any) -> list[dict[str, Any]]:
        assert run.main([*map(str, argv), "--threads", "1"]) == 0
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    told = lines(caption[2], *images, "--max_new_tokens", 4)
    assert [one["caption"] for one in told] == caption[1](images, max_new_tokens=4)
    (features,) = lines(clip[2], images[0])
    assert np.abs(np.array(features["embedding"]) - clip[1].embed_images(images[:1])).max() < 1e-5
    (fitting,) = lines(clip[2], images[0], "--texts", "a dog", "a cat", "--verify")
    assert list(fitting["probs"]) == ["a dog", "a cat"]
    assert abs(sum(fitting["probs"].values()) - 1) < 1e-5
    assert run.main(["/nowhere", str(images[0])]) == 2
    assert "not an exported folder" in capsys.readouterr().err


def test_a_folder_of_another_task_is_told(clip: Exported) -> None:
    with pytest.raises(UserError, match="--task=clip, not onnx of --task=caption"):
        OnnxCaptioner(clip[2])


def test_without_onnxruntime_the_runner_tells_it(
    clip: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match="pip install onnxruntime"):
        open_folder(clip[2])
