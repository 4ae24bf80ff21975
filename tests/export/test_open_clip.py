"""open_clip reads what is exported, and gives the same features."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import engine.torchvision_ops  # noqa: F401  before open_clip, which imports torchvision

import open_clip as peer  # isort: skip
from engine.config import schema
from engine.config.schema import Export, Resize, Transforms
from engine.data.text import bytes as byte_tokenizer
from engine.errors import UserError
from engine.export import open_clip
from engine.registry import find
from engine.run import Run
from tests.export.models import opened

BERT = {"model_type": "bert", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 48}  # fmt: skip
TEXTS = ["a dog", "two cats on a mat", ""]


def make(
    image: dict[str, Any] | None = None,
    pool: str = "mean",
    loss: str = "NCE",
    transforms: dict[str, Any] | None = None,
) -> Run:
    encoder = schema.ImageEncoder(**{"tag": "resnet10t"} | (image or {}))
    text = schema.TextEncoder(config=BERT, pool=pool, max_length=20)
    resize = {"resize": Resize(size=(64, 64), interpolation="bicubic")}
    config = schema.Config(
        model=schema.Model(image_encoder=encoder, text_encoder=text,
                           projection=schema.Projection(dim=24)),
        loss=schema.Loss(name=loss),
        transforms=Transforms(train_transforms=["resize"], valid_transforms=["resize"],
                              **resize | (transforms or {})),
    )  # fmt: skip
    tokenizer = byte_tokenizer.build(schema.Tokenizer(name="bytes"))
    task = find("tasks", "clip").build(config, tokenizer)
    torch.manual_seed(0)
    return opened("clip", config, task, task.build_model().eval().requires_grad_(False))


@pytest.mark.parametrize(("pool", "loss"), [("mean", "NCE"), ("first", "sigmoid")])
def test_features_are_open_clips(tmp_path: Path, pool: str, loss: str) -> None:
    trained = make(pool=pool, loss=loss)
    model: Any = trained.model
    model.logit_scale.fill_(2.5)
    open_clip.build(trained, tmp_path / "out", Export(), "export.output")
    theirs, _, transform = peer.create_model_and_transforms(f"local-dir:{tmp_path / 'out'}")
    tokenizer = peer.get_tokenizer(f"local-dir:{tmp_path / 'out'}")
    theirs.eval()
    pixels = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    image_BCHW = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    with torch.no_grad():
        image_BD = trained.task.encode(model, {"image_BCHW": image_BCHW}, "image")
        text_BD = trained.task.encode(model, trained.task.tokenize(TEXTS), "text")
        seen = torch.stack([transform(Image.fromarray(one)) for one in pixels])
        found = theirs(seen, tokenizer(TEXTS))
    assert (found[0] - image_BD).abs().max() < 1e-5
    assert (found[1] - text_BD).abs().max() < 1e-5
    assert abs(float(found[2]) - np.exp(2.5)) < 1e-4
    if loss == "sigmoid":
        assert float(found[3]) == float(model.logit_bias)


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"image": {"tag": "resnet10t", "param": {"stem_width": 8}}}, "model.image_encoder.param"),
        ({"image": {"tag": "vit_tiny_patch16_224"}}, "model.image_encoder.image_size"),
        ({"pool": "last"}, "model.text_encoder.pool"),
        ({"transforms": {"image_aspect_ratio": "pad"}}, "transforms.image_aspect_ratio"),
    ],
)
def test_what_open_clip_would_build_otherwise_is_refused(
    tmp_path: Path, settings: dict[str, Any], key: str
) -> None:
    with pytest.raises(UserError) as caught:
        open_clip.build(make(**settings), tmp_path / "out", Export(), "export.output")
    assert caught.value.key == key
    assert not any(tmp_path.iterdir())


def test_another_task_is_refused(tmp_path: Path) -> None:
    trained = make()
    config = trained.config.model_copy(update={"task": None})
    other = opened("caption", config, trained.task, trained.model)
    with pytest.raises(UserError, match="--task=caption cannot be exported to open_clip"):
        open_clip.build(other, tmp_path / "out", Export(), "export.output")
