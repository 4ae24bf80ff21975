"""What of an image each of its labels looked at: the decoder's own attention weights.

A label's tokens are read behind image and prompt, as in training. The weights with which they look
at the image's tokens are averaged over blocks, heads and the label's tokens. They tell where the
decoder took its values from, which is not the same as why it chose the label.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from engine.generate.labels import LabellingTask, encode_prompt
from engine.models.vision_language import Recognizer


@torch.no_grad()
def attention_maps(
    task: LabellingTask,
    model: Recognizer,
    image_1CHW: Tensor,
    labels: Sequence[tuple[int, ...]],
) -> Tensor:
    """Weights [labels, h, w] over one image, its rows from the top; ``labels`` are tokens."""
    if not labels:
        return torch.zeros(0, 1, 1)
    decoder = model.decoder
    encoded = encode_prompt(task, model, image_1CHW)
    device, start = image_1CHW.device, encoded.state.num_text
    ids = [(token, number, start + place) for number, label in enumerate(labels)
           for place, token in enumerate(label)]  # fmt: skip
    ids_S, number_S, position_S = torch.tensor(ids, device=device).unbind(1)
    with eager(decoder.model):
        output = decoder.extend(
            encoded.state, ids_S[None], number_S[None] + 1, position_S[None], output_attentions=True
        )
    num_image = encoded.state.num_image
    weights_LSN = torch.stack([w[0].float().mean(0)[:, :num_image] for w in output.attentions])
    weight_SN = weights_LSN.mean(0)
    sums_KN = weight_SN.new_zeros(len(labels), num_image).index_add_(0, number_S, weight_SN)
    mean_KN = sums_KN / torch.tensor([[len(label)] for label in labels], device=device)
    if model.keep_prefix:  # class tokens lie nowhere in the image
        mean_KN = mean_KN[:, getattr(model.image_encoder, "num_prefix_tokens", 0) :]
    height, width = grid(mean_KN.shape[1], image_1CHW.shape[2] / image_1CHW.shape[3])
    return mean_KN.view(-1, height, width)


def grid(num_tokens: int, ratio: float) -> tuple[int, int]:
    """Rows and columns that so many tokens lie in, of an image ``ratio`` times as high as wide."""
    rows = [n for n in range(1, num_tokens + 1) if num_tokens % n == 0]
    height = min(rows, key=lambda n: abs(math.log(n * n / num_tokens / ratio)))
    return height, num_tokens // height


@contextmanager
def eager(model: Any) -> Iterator[None]:
    """Attention that gives its weights away, within the block."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)
