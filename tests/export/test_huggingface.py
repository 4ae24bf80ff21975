"""transformers alone, by the code of an exported folder's README, computes what we do."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.modeling_outputs import BaseModelOutput

from engine.config import schema
from engine.config.schema import Crop, Export, Generate, Resize, Transforms
from engine.errors import UserError
from engine.export import exported_model, huggingface
from engine.export.images import Preprocess, image_section
from engine.generate.labels import encode_prompt, recognise
from engine.generate.texts import generate_texts
from engine.models.decoders.language_model import DecoderInput
from engine.run import Run
from tests.export.models import GPT2, LLAMA, TEXT, opened, uint8
from tests.export.parts import CLIP_TEXT, CLIP_VISION, RESNET, T5, VIT, VIT_HF, make
from tests.models.decoders.nll import nll
from tests.models.decoders.test_decoders import SIZES

TEXTS = ["a photo of a dog", "a photo of a cat"]  # of the README


def run_readme(trained: Run, tmp_path: Path, monkeypatch) -> tuple[dict[str, Any], torch.Tensor]:
    """What the README's code leaves behind, with pixels and image tokens as its model has them,
    and the pixels of the same image as we have them."""
    folder = tmp_path / "out"
    huggingface.build(trained, folder, Export(), "export.output")
    pixels = np.random.default_rng(0).integers(0, 256, (6, 4, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((40, 60), Image.Resampling.NEAREST).save(
        folder / "a.jpg", quality=95
    )
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)
    assert "engine" not in code
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "exported_model", raising=False)
    told: dict[str, Any] = {}
    with torch.no_grad():
        exec(code, told)  # what a reader would run
    torch.set_grad_enabled(True)
    encoder = getattr(told["model"], "image_encoder", None)
    if encoder is not None:
        assert sys.modules["exported_model"].__file__ == str(folder / "exported_model.py")
        told["processor"], told["pixels"] = encoder.processor, encoder.pixels(["a.jpg"])
    if hasattr(told["model"], "image_tokens"):
        told["tokens"] = told["model"].image_tokens(told["pixels"])
    preprocess = Preprocess(image_section(trained.config))
    seen = preprocess(["a.jpg"])
    assert np.abs(told["pixels"].numpy() - seen).max() < 1e-5
    return told, uint8([preprocess.pixels("a.jpg")])


def near(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return bool((ours - theirs).abs().max() < 1e-5 * ours.abs().max().clamp_min(1))


@pytest.mark.parametrize(
    ("image", "text", "pool"),
    [(RESNET, TEXT, "mean"), (VIT, TEXT, "last"), (VIT | {"pool": "mean"}, TEXT, "first"),
     (CLIP_VISION, TEXT, "mean"), (VIT_HF, TEXT, "mean"),
     (VIT_HF | {"pool": "mean"}, TEXT, "mean"), (VIT, CLIP_TEXT, "last")],
)  # fmt: skip
def test_a_clip_runs_features(image, text, pool, tmp_path, monkeypatch) -> None:
    text_encoder = schema.TextEncoder(config=text, pool=pool, max_length=24)
    biased, whole = text is TEXT and pool == "last", text is CLIP_TEXT
    loss = schema.Loss(name="sigmoid" if biased else "NCE")
    trained = make("clip", image, {"text_encoder": text_encoder,
                                   "projection": schema.Projection(dim=16)}, loss=loss)  # fmt: skip
    told, image_1CHW = run_readme(trained, tmp_path, monkeypatch)
    model: Any = trained.model
    with torch.no_grad():
        image_1D = trained.task.encode(model, {"image_BCHW": image_1CHW}, "image")
        text_2D = trained.task.encode(model, trained.task.tokenize(TEXTS), "text")
    assert near(image_1D, told["image"]) and near(text_2D, told["text"])
    assert (tmp_path / "out" / "image_encoder").exists() != whole == ("VisionText" in str(told))
    logits = model.logit_scale.exp() * image_1D @ text_2D.T
    if biased:
        logits = logits + model.logit_bias
    assert (told["logits"] - logits).abs().max() < 1e-3


DECODERS = {
    "gpt2": ("causal", GPT2 | {"n_positions": 64}), "llama": ("causal", LLAMA),
    "opt": ("causal", SIZES["opt"] | {"max_position_embeddings": 64}),
    "mpt": ("causal", SIZES["mpt"] | {"max_seq_len": 96}), "t5_cross": ("t5_cross", T5),
    "t5": ("t5", T5),
}  # fmt: skip
CONNECTED = {
    "gpt2": (VIT, {"name": "mlp2x_gelu", "layer": -2, "keep_cls": False}),
    "opt": (RESNET, {"name": "linear_norm"}),
    "llama": (CLIP_VISION, {"name": "linear_no_bias", "layer": -2}),
    "mpt": (VIT, {"name": "linear"}),
    "t5_cross": (VIT, {"name": "identity", "keep_cls": False}),
    "t5": (VIT_HF, {"name": "linear_norm", "layer": -1, "positions": "sincos2d"}),
}  # fmt: skip


def speaking(task: str, kind: str, **data: Any) -> Run:
    name, sizes = DECODERS[kind]
    image, connector = CONNECTED[kind]
    more = {"decoder": schema.Decoder(name=name, config=sizes, max_length=64),
            "connector": schema.Connector(**connector)}  # fmt: skip
    return make(task, image, more, data=schema.Data(**data))


@pytest.mark.parametrize("kind", DECODERS)
def test_what_is_said_of_an_image(kind: str, tmp_path, monkeypatch, capsys) -> None:
    if kind in ("t5", "gpt2"):
        own = "ask {images}{question} [so {instruction}]"
        cut = "reference" if kind == "t5" else "clean"
        prompt = schema.Prompt(template=own, instruction="tell", tokenize=cut)
        trained, said = speaking("vqa", kind, prompt=prompt), "What is it?"
    else:
        prompt = schema.Prompt(template="{instruction}: ", instruction="Say")
        trained, said = speaking("caption", kind, prompt=prompt), "Say"
    told, image_1CHW = run_readme(trained, tmp_path, monkeypatch)
    task, model = trained.task, trained.model
    (want,) = generate_texts(task, model, image_1CHW, [said], Generate())
    theirs, image = told["model"], told["tokens"]
    assert capsys.readouterr().out.rstrip("\n") == want[0]
    outputs, next_token = [], getattr(theirs, "next", None)
    theirs.next = lambda *given, **more: outputs.append(next_token(*given, **more)) or outputs[-1]
    with torch.no_grad():
        found = theirs.say(image, theirs.prompt(said))
        assert len(found) > 9 and theirs.tokenizer.decode(found).strip() == want[0]
        image_1ND = model.image_tokens(image_1CHW)
        assert near(image_1ND, image)
        ids_1T, mask_1T = task.prompts([said])
        labels = torch.tensor([found[:8]])
        if kind == "t5":
            own_nll = nll(model.decoder, image_1ND, ids_1T, mask_1T, labels)
            embeds = theirs.encoded(image, theirs.prompt(said))
            loss = theirs.model(inputs_embeds=embeds, labels=labels).loss
        elif kind == "t5_cross":
            own_nll = nll(model.decoder, image_1ND, ids_1T, mask_1T, ids_1T)
            memory = BaseModelOutput(last_hidden_state=image)
            loss = theirs.model(
                encoder_outputs=memory, decoder_input_ids=ids_1T, labels=ids_1T
            ).loss
            labels = ids_1T
        else:  # the states behind all that was said, read at once
            assert torch.equal(ids_1T, theirs.text_ids(theirs.prompt(said)))
            whole = torch.cat([ids_1T, torch.tensor([found])], dim=1)
            hidden = model.decoder.hidden(DecoderInput(image_1ND, whole, torch.ones_like(whole)))[
                :, -1
            ]
            weight, bias = model.decoder.head()
            assert near(torch.nn.functional.linear(hidden, weight, bias), outputs[-1].logits[:, -1])
            return
        assert abs(float(own_nll) - float(loss) * labels.numel()) < 1e-4


@pytest.mark.parametrize(
    ("sizes", "decoder"),
    [(LLAMA | {"num_hidden_layers": 3}, {"keep": [0, 2]}),
     (GPT2 | {"n_positions": 64}, {"image_token": "<|image|>"}), (SIZES["mpt"], {"num_blocks": 1})],
)  # fmt: skip
def test_labels_and_their_probabilities(sizes, decoder, tmp_path, monkeypatch, capsys) -> None:
    more = {"decoder": schema.Decoder(name="truncated", config=sizes, max_length=16, **decoder)}
    mark = decoder.get("image_token")
    group = {"pattern": "wte", "train": "rows", "tokens": [mark]}
    labels = schema.Labels(prompt="It has", train_prompts=[])
    trained = make(
        "recognize", VIT, more, optim=schema.Optim(groups=[group] if mark else []),
        generate=Generate(method="one_shot", num_labels=9, first_tokens=30),
        data=schema.Data(labels=labels),
    )  # fmt: skip
    task, model = trained.task, trained.model
    for parameter in model.parameters():
        parameter.mul_(0.5 if parameter.ndim > 1 else 1)
    model.decoder.head()[0][task.separator_id] *= 8  # it comes easily
    if mark:  # the row of its own is not the table's
        rows = model.decoder.model.get_input_embeddings().token_rows.rows_RD
        rows.copy_(torch.randn(rows.shape))
    told, image_1CHW = run_readme(trained, tmp_path, monkeypatch)
    with torch.no_grad():
        encoded = encode_prompt(task, model, image_1CHW)
        (want,) = recognise(task, model, encoded, trained.config.generate)
    assert len(want) > 9 and any(len(one.ids) > 1 for one in want)
    probs = {one.text: one.prob for one in want}
    assert len(capsys.readouterr().out.splitlines()) == 9
    told["model"].settings["labels"]["num_labels"] = 30
    assert told["model"].labels("a.jpg") == pytest.approx(probs, rel=1e-3, abs=1e-15)


def test_the_file_in_the_folder_needs_transformers_alone() -> None:
    tree = ast.parse(Path(exported_model.__file__).read_text())
    names = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    names += [one.name for node in ast.walk(tree) if isinstance(node, ast.Import)
              for one in node.names]  # fmt: skip
    own = {name.partition(".")[0] for name in names} - sys.stdlib_module_names
    assert own == {"torch", "transformers", "PIL", "safetensors"}


# --- what cannot be exported


def small(task: str = "caption", image: dict[str, Any] | None = None, **sections: Any) -> Run:
    more = {"decoder": schema.Decoder(name="causal", config=LLAMA, max_length=24)}
    return make(task, image or RESNET, more, **sections)


@pytest.mark.parametrize(
    ("transforms", "told"),
    [
        ({"image_aspect_ratio": "pad"}, {"do_pad": True, "size": {"height": 32, "width": 32}}),
        ({"valid_transforms": ["resize", "center_crop"], "resize": Resize(size=40),
          "center_crop": Crop(size=(32, 32))}, {"size": {"shortest_edge": 40}}),
    ],
)  # fmt: skip
def test_images_are_prepared_alike(transforms, told, tmp_path, monkeypatch) -> None:
    resize = {"resize": Resize(size=(32, 32), interpolation="bilinear")}
    given = {"train_transforms": ["resize"], "valid_transforms": ["resize"], **resize} | transforms
    given["train_transforms"] = given["valid_transforms"]
    trained = small(transforms=Transforms(**given))
    found, _ = run_readme(trained, tmp_path, monkeypatch)
    settings = found["processor"].to_dict()
    assert all(settings[name] == value for name, value in told.items())


class Foreign(torch.nn.Module):
    """An image encoder from elsewhere."""


@pytest.mark.parametrize("fault", ["crop", "encoder", "weights", "task", "texts"])
def test_what_transformers_would_build_otherwise_is_refused(fault: str, tmp_path) -> None:
    size = {"resize": Resize(size=(32, 32)), "train_transforms": ["resize"]}
    changes = {"image_aspect_ratio": "crop"} if fault == "crop" else {}
    trained = small(transforms=Transforms(**size, valid_transforms=["resize"], **changes))
    keys = {"crop": "transforms.image_aspect_ratio", "encoder": "model.image_encoder.name",
            "weights": "model.image_encoder.tag", "task": "export.format",
            "texts": "model.text_encoder"}  # fmt: skip
    if fault == "texts":  # half of a T5, which AutoModel takes for a whole one
        trained = make("clip", RESNET, {"text_encoder": schema.TextEncoder(config=T5)})
    if fault == "encoder":
        trained.model.image_encoder = Foreign()
    if fault == "weights":  # a layer that the model's name says nothing of
        trained.model.image_encoder.model.act1 = torch.nn.Tanh()
    if fault == "task":
        trained = opened("linear_probe", trained.config, trained.task, trained.model)
    with pytest.raises(UserError) as caught:
        huggingface.build(trained, tmp_path / "out", Export(), "export.output")
    assert caught.value.key == keys[fault]
    assert not any(tmp_path.iterdir())
