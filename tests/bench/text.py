"""Captions at their real length beside captions padded to 77 tokens: our text tower, our step.

    python -m tests.bench text [--threads N]

The dual encoder of CLIP ViT-B/32 with all widths divided by four, its captions drawn with a mean of
18 tokens. Both sides run the engine's decoupled accumulation over the same sub-batches' number; the
trimmed one sorts captions by length over the whole batch, the fixed one keeps all 77 columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import engine.torchvision_ops  # noqa: F401
from engine.config import schema
from engine.models.dual_encoder import DualEncoder
from engine.registry import find
from engine.train.precision import Precision
from engine.train.steps import dga
from engine.train.steps.batches import Split, take
from engine.types import Batch, Features
from tests.bench.accumulation import PairTask
from tests.bench.table import Line, Options
from tests.bench.timing import summaries
from tests.train.tiny import replicas

CPU = torch.device("cpu")
LONGEST, MEAN_TOKENS, WIDTH = 77, 18, 128
VOCABULARY = 49_408 // 4  # so that the table of tokens has its due share of the work


class Trimmed(PairTask):
    """Contrast of pairs whose order does not matter: the step may sort them by length."""

    rows_interact = False

    def __init__(self) -> None:
        super().__init__("NCE")


class Fixed(PairTask):
    """The same with every caption padded to 77 columns, whatever the step left of them."""

    def __init__(self) -> None:
        super().__init__("NCE")

    def features(self, model: Callable[..., Any], batch: Batch) -> Features:
        return super().features(model, padded(batch))


def padded(batch: Batch) -> Batch:
    """Token ids and mask with columns of padding up to 77."""
    names = ("input_ids_BT", "attention_mask_BT")
    more = LONGEST - batch["input_ids_BT"].shape[1]
    return batch | {name: nn.functional.pad(batch[name], (0, more)) for name in names}


def make_model(quick: bool) -> DualEncoder:
    """A quarter of the widths of ViT-B/32 and its text tower, depths and tokens as they are."""
    torch.manual_seed(0)
    depth, text_depth = (1, 1) if quick else (12, 12)
    image = schema.ImageEncoder(
        tag="vit_base_patch32_224", param={"embed_dim": 192, "num_heads": 3, "depth": depth}
    )
    text = schema.TextEncoder(
        config={
            "model_type": "bert",
            "hidden_size": WIDTH,
            "num_hidden_layers": text_depth,
            "num_attention_heads": 2,
            "intermediate_size": 4 * WIDTH,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        },
        max_length=LONGEST,
    )
    loss = Trimmed().loss
    return DualEncoder(
        find("models/image", "timm").build(image, image_size=64 if quick else 224),
        find("models/text", "huggingface").build(text, vocab_size=VOCABULARY, pad_id=0),
        WIDTH,
        scalars=loss.parameters,
        bounds=loss.bounds,
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
    )


def make_batch(rows: int, image_size: int, vocabulary: int = VOCABULARY) -> Batch:
    """uint8 images, and captions of 8 to 40 tokens, most of them near the mean of 18."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(rows, generator=generator) * 0.33
    lengths = (17 * spread.exp()).round().long().clamp(8, 40)
    width = int(lengths.max())
    shape = (rows, 3, image_size, image_size)
    mask = (torch.arange(width) < lengths[:, None]).long()
    return {
        "image_BCHW": torch.randint(256, shape, dtype=torch.uint8, generator=generator),
        "input_ids_BT": mask * torch.randint(5, vocabulary, (rows, width), generator=generator),
        "attention_mask_BT": mask,
        "step": 0,
    }


def tower(model: DualEncoder, batch: Batch, k: int, *, trimmed: bool) -> Callable[[], Tensor]:
    """Forward and backward of the text tower over all sub-batches; features in batch order."""
    split = Split(batch, k, by_length=trimmed)
    parts = [take(batch, rows) for rows in split.rows]
    parts = parts if trimmed else [padded(part) for part in parts]
    generator = torch.Generator().manual_seed(1)
    pull_BD = torch.randn(len(batch["image_BCHW"]), WIDTH, generator=generator)
    pulls = split.in_parts(pull_BD)

    def work() -> Tensor:
        done = []
        for part, pull in zip(parts, pulls, strict=True):
            feature_BD = model.text_encoder(part["input_ids_BT"], part["attention_mask_BT"])
            feature_BD.backward(pull)
            done.append(feature_BD.detach())
        return split.batch_order(done)

    return work


def step(model: DualEncoder, batch: Batch, k: int, task: PairTask) -> Callable[[], Tensor]:
    """The engine's accumulation step with as little memory as it can, and the update."""
    rows = len(batch["image_BCHW"])
    gradients = dga.build(
        schema.Runner(keep_graphs=1),
        schema.Data(batch_size_train=rows // k),
        task=task,
        model=replicas(model),
        precision=Precision("fp32", CPU),
        device=CPU,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)

    def work() -> Tensor:
        loss = gradients(batch, 0)["loss"]
        optimizer.step()
        return loss

    return work


def assert_equal(model: DualEncoder, pairs: list[Callable[[], Tensor]]) -> None:
    """Both sides give the same values and gradients, to 1e-4 (fp32)."""
    values, gradients = [], []
    for work in pairs:
        model.zero_grad(set_to_none=True)
        values.append(work())
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    model.zero_grad(set_to_none=True)
    torch.testing.assert_close(values[0], values[1], rtol=1e-4, atol=1e-4)
    for name, want in gradients[1].items():
        error = (gradients[0][name] - want).norm()
        assert error <= 1e-3 * want.norm() + 1e-5, (name, float(error))


def rows(options: Options) -> Iterator[Line]:
    """How many times faster trimmed text makes the text tower and the whole step."""
    model = make_model(options.quick)
    count, k = (8, 2) if options.quick else (128, 4)
    batch = make_batch(count, 64 if options.quick else 224)
    mean = float(batch["attention_mask_BT"].sum(1).float().mean())
    assert options.quick or abs(mean - MEAN_TOKENS) < 1.5, mean
    towers = {
        "trimmed": tower(model, batch, k, trimmed=True),
        "fixed": tower(model, batch, k, trimmed=False),
    }
    steps = {
        "trimmed": step(model, batch, k, Trimmed()),
        "fixed": step(model, batch, k, Fixed()),
    }
    for what, work, mark in (("text tower", towers, "≥ 3"), ("step", steps, "≥ 1.35")):
        assert_equal(model, list(work.values()))
        cleared = {name: _cleared(model, run) for name, run in work.items()}
        found = summaries(cleared, 1 if options.quick else options.repeats)
        seconds = {name: timing.seconds for name, timing in found.items()}
        yield Line(
            f"{what}, {mean:.0f} tokens, fixed 77 ÷ trimmed",
            ours=1e3 * seconds["trimmed"],
            peer=1e3 * seconds["fixed"],
            ratio=seconds["fixed"] / max(seconds["trimmed"], 1e-9),
            spread=max(timing.spread for timing in found.values()),
            mark=mark,
            unit="ms",
        )


def _cleared(model: DualEncoder, work: Callable[[], Tensor]) -> Callable[[], None]:
    def run() -> None:
        work()
        model.zero_grad(set_to_none=True)

    return run
