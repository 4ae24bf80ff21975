"""The model of the accumulation benchmarks, and the two peers' algorithms after their sources.

Both peers get a list of sub-batches, a ``loss(image_BD, text_BD, scale, bias)`` and the model, and
leave their gradients in ``.grad``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

import engine.torchvision_ops  # noqa: F401
from engine.config import schema
from engine.losses import nce, sigmoid
from engine.models.dual_encoder import DualEncoder
from engine.registry import find
from engine.types import Batch, Features

Loss = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
VOCABULARY, TOKENS = 1000, 16


class PairTask:
    """Contrast of the dual encoder's features; rows keep their order, as the peers' do."""

    rows_interact = True

    def __init__(self, loss: str) -> None:
        config = schema.Loss(name=loss)
        self.loss = {"NCE": nce, "Sigmoid": sigmoid}[loss].build(config)

    def features(self, model: Callable[..., Any], batch: Batch) -> Features:
        outputs = model(batch)
        return Features(outputs, {name: outputs.pop(name) for name in self.loss.parameters})

    def losses(self, features: Features) -> dict[str, Tensor]:
        return self.loss(features)


def make_model(
    loss: str,
    *,
    image_size: int,
    dropout: float = 0.0,
    patch_drop: float = 0.0,
    small: bool = False,
) -> Any:
    """ViT-Ti/16 (5.5M parameters) and a BERT of 3 × 192; ``small``: a hundredth of that, fp64."""
    torch.manual_seed(0)
    width, depth = (32, 2) if small else (192, 3)
    image = schema.ImageEncoder(
        tag="vit_tiny_patch16_224",
        patch_drop=patch_drop,
        param={
            "proj_drop_rate": dropout,
            **({"embed_dim": 32, "depth": 2, "num_heads": 2} if small else {}),
        },
    )
    text = schema.TextEncoder(
        config={
            "model_type": "bert",
            "hidden_size": width,
            "num_hidden_layers": depth,
            "num_attention_heads": width // 16,
            "intermediate_size": 4 * width,
            "hidden_dropout_prob": dropout,
            "attention_probs_dropout_prob": dropout,
        },
        max_length=TOKENS,
    )
    task = PairTask(loss)
    model = DualEncoder(
        find("models/image", "timm").build(image, image_size=image_size),
        find("models/text", "huggingface").build(text, vocab_size=VOCABULARY, pad_id=0),
        16 if small else 512,
        scalars=task.loss.parameters,
        bounds=task.loss.bounds,
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
    )
    return model.double() if small else model


def make_batch(rows: int, image_size: int, first: int = 0) -> Batch:
    """uint8 images and texts of full length, from row ``first`` of one endless set."""
    generators = [torch.Generator().manual_seed(first + row) for row in range(rows)]
    shape = (3, image_size, image_size)
    images = [torch.randint(256, shape, dtype=torch.uint8, generator=g) for g in generators]
    ids = [torch.randint(5, VOCABULARY, (TOKENS,), generator=g) for g in generators]
    return {
        "image_BCHW": torch.stack(images),
        "input_ids_BT": torch.stack(ids),
        "attention_mask_BT": torch.ones(rows, TOKENS, dtype=torch.long),
        "step": 0,
    }


def split(batch: Batch, k: int) -> list[Batch]:
    """k sub-batches of equally many rows."""
    rows = len(batch["image_BCHW"]) // k
    return [
        {
            name: value[j * rows : (j + 1) * rows] if isinstance(value, Tensor) else value
            for name, value in batch.items()
        }
        for j in range(k)
    ]


def gradcache(
    model: nn.Module,
    shared: nn.Module,
    loss: Loss,
    parts: Sequence[Batch],
    random: Callable[[int], AbstractContextManager[None]],
) -> Tensor:
    """GradCache (Gao et al. 2021): everything without graph, the loss, everything again.

    The temperature is a parameter in the loss's closure, as its interface wants it.
    """
    reps: list[tuple[Tensor, Tensor]] = []
    with torch.no_grad():
        for j, part in enumerate(parts):
            with random(j):
                outputs = model(part)
            reps.append((outputs["image_BD"], outputs["text_BD"]))
    image, text = (torch.cat(side).requires_grad_() for side in zip(*reps, strict=True))
    value = loss(image, text, *_scalars(shared))
    value.backward()
    caches = [side.grad.chunk(len(parts)) for side in (image, text) if side.grad is not None]
    for j, part in enumerate(parts):
        last = j == len(parts) - 1
        with nullcontext() if last or not hasattr(model, "no_sync") else model.no_sync():
            with random(j):
                outputs = model(part)
            names = ("image_BD", "text_BD")
            dots = [(outputs[n] * c[j]).sum() for n, c in zip(names, caches, strict=True)]
            torch.stack(dots).sum().backward()
    return value.detach()


def open_clip(
    model: nn.Module,
    loss: Loss,
    parts: Sequence[Batch],
    first: Callable[[int], AbstractContextManager[None]],
    second: Callable[[int], AbstractContextManager[None]],
) -> Tensor:
    """open_clip 3.3 ``--accum-freq``: cached features, then k whole losses, each with one live."""
    cached: list[dict[str, Tensor]] = []
    with torch.no_grad():
        for j, part in enumerate(parts):
            with first(j):
                cached.append(model(part))
    value = torch.zeros(())
    for j, part in enumerate(parts):
        with second(j):
            outputs = model(part)
        image, text = (
            torch.cat([outputs[n] if i == j else c[n] for i, c in enumerate(cached)])
            for n in ("image_BD", "text_BD")
        )
        bias = outputs.get("logit_bias")
        value = loss(image, text, outputs["logit_scale"].exp(), bias)
        value.backward()
    return value.detach()


def _scalars(shared: Any) -> tuple[Tensor, Tensor | None]:
    return shared.logit_scale.exp(), getattr(shared, "logit_bias", None)
