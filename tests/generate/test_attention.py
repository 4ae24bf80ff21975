"""Where labels look: the weights that transformers' own attention gives, averaged."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from engine.generate.attention import attention_maps, grid
from engine.logs.gallery import weight_map
from tests.generate.labeller import labeller

IMAGE = torch.randint(
    256, (1, 3, 2, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(2)
)


def test_maps_are_the_mean_weights_of_each_labels_tokens() -> None:
    task, model = labeller()
    labels = [(104, 105, 110), (70,), (99, 33)]
    maps = attention_maps(task, model, IMAGE, labels)
    assert maps.shape == (3, 2, 4)
    base = model.decoder.base[0]
    assert base.config._attn_implementation == "sdpa"
    image_BND = model.image_tokens(IMAGE)
    head = task.prompt_ids()
    model.decoder.model.set_attn_implementation("eager")
    for label, found in zip(labels, maps, strict=True):
        ids = torch.tensor([[*head.tolist(), *label]])
        embeds = torch.cat([image_BND, model.decoder.model.get_input_embeddings()(ids)], dim=1)
        length = embeds.shape[1]
        sees = torch.ones(length, length).tril().bool()
        sees[:8, :8] = True
        mask = torch.zeros(length, length).double().masked_fill(~sees, -1e30)[None, None]
        out = base(inputs_embeds=embeds, attention_mask=mask, output_attentions=True)
        weights = torch.stack(out.attentions)[:, 0]  # blocks, heads, queries, keys
        want = weights[:, :, -len(label) :, :8].mean((0, 1, 2)).view(2, 4)
        torch.testing.assert_close(found.double(), want, rtol=1e-5, atol=1e-7)
    assert 0 < float(maps.sum(dim=(1, 2)).max()) <= 1
    assert attention_maps(task, model, IMAGE, []).shape[0] == 0


@pytest.mark.parametrize(
    ("tokens", "ratio", "want"),
    [(16, 1.0, (4, 4)), (256, 1.0, (16, 16)), (32, 0.5, (4, 8)), (32, 2.0, (8, 4)),
     (7, 0.5, (1, 7))],
)  # fmt: skip
def test_a_grid_has_the_images_form(tokens: int, ratio: float, want: tuple[int, int]) -> None:
    assert grid(tokens, ratio) == want


def test_a_picture_glows_where_the_weight_is() -> None:
    weight = np.zeros((4, 4), dtype=np.float32)
    weight[0, 3] = 0.4
    picture = weight_map(Image.new("RGB", (64, 32), "grey"), weight, "a label  0.123")
    assert picture.size == (448, 224 + 34)
    pixels = np.asarray(picture).astype(int)
    changed = np.abs(pixels[:224] - 128).sum(-1)
    assert changed[:50, 360:].min() > 60 and changed[120:, :200].max() < 12
    flat = weight_map(Image.new("RGB", (64, 32), "grey"), np.ones((4, 4)), "x" * 500)
    assert (np.asarray(flat)[:224] == 128).all()
