"""Parts of a model as functions of tensors alone, and their translation to ONNX.

Sizes that may change from call to call are found by torch.export and given names here, in the
file as in the manifest: whoever reads either sees which of them belong together.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import engine.torchvision_ops  # noqa: F401  before transformers, which imports torchvision

import transformers  # isort: skip
from engine.errors import FaultError
from engine.models import pretrained
from engine.models.dual_encoder import DualEncoder
from engine.models.vision_language import VisionLanguage

LIMIT = 2_000_000_000  # bytes of a file; protobuf's own bound is 2³¹ − 1, with the graph


@dataclass(frozen=True, slots=True)
class Argument:
    """An example of one input, and the names of those of its sizes that may change, by axis."""

    name: str
    example: Tensor
    sizes: dict[int, str]


class ImageFeatures(nn.Module):
    """Normalised images [B, C, H, W] → L2-normed features [B, D]."""

    def __init__(self, model: DualEncoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.model({"image_BCHW": pixel_values})["image_BD"]


class TextFeatures(nn.Module):
    """Token ids and their mask [B, T] → L2-normed features [B, D]."""

    def __init__(self, model: DualEncoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        batch = {"input_ids_BT": input_ids, "attention_mask_BT": attention_mask}
        return self.model(batch)["text_BD"]


class ImageTokens(nn.Module):
    """Normalised images [B, C, H, W] → what the decoder is given of them, [B, N, D]."""

    def __init__(self, model: VisionLanguage) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.model.image_tokens(pixel_values)


def write(
    part: nn.Module,
    arguments: Sequence[Argument],
    outputs: Sequence[str],
    path: Path,
    *,
    past: Sequence[Argument] = (),
    opset: int,
    beside: bool,
) -> dict[str, Any]:
    """Translate ``part`` to the file ``path``; returns its shapes for the manifest.

    ``past`` are the items of its last argument, a list. Weights are in ``path``.data where they
    come to 2 GB or more, or ``beside`` asks for it.
    """
    with torch.no_grad(), _quietly(), _plain_attention(part):
        program = torch.onnx.export(
            part,
            (*_examples(arguments), *([_examples(past)] if past else [])),
            input_names=[argument.name for argument in (*arguments, *past)],
            output_names=list(outputs),
            dynamic_shapes=(*_dynamic(arguments), *([_dynamic(past)] if past else [])),
            opset_version=opset,
            dynamo=True,
            verbose=False,
        )
    if program is None:
        raise FaultError("torch.onnx.export gave no program")
    graph = program.model.graph
    _name_sizes(graph, [*arguments, *past])
    weights = (value.const_value for value in graph.initializers.values())
    num_bytes = sum(weight.nbytes for weight in weights if weight is not None)
    beside = beside or num_bytes >= LIMIT
    program.save(path, external_data=beside)
    described = {
        kind: {value.name: _shape(value) for value in values}
        for kind, values in (("inputs", graph.inputs), ("outputs", graph.outputs))
    }
    return {"file": path.name, **described}


def _examples(arguments: Sequence[Argument]) -> list[Tensor]:
    return [argument.example for argument in arguments]


def _dynamic(arguments: Sequence[Argument]) -> list[dict[int, Any]]:
    return [dict.fromkeys(argument.sizes, torch.export.Dim.DYNAMIC) for argument in arguments]


def _name_sizes(graph: Any, arguments: Sequence[Argument]) -> None:
    """Our names of sizes in place of torch's s0, s1 …, wherever they occur."""
    names: dict[str, str] = {}
    for argument, value in zip(arguments, graph.inputs, strict=True):
        names |= {str(value.shape[axis]): name for axis, name in argument.sizes.items()}
    symbol = re.compile(r"\b(" + "|".join(map(re.escape, names)) + r")\b")
    values = [*graph.inputs, *(value for node in graph for value in node.outputs)]
    for value in values:
        if value.shape is not None and not value.shape.frozen:
            for axis, size in enumerate(value.shape):
                if not isinstance(size, int) and size.value:
                    value.shape[axis] = symbol.sub(lambda found: names[found[1]], size.value)


def _shape(value: Any) -> dict[str, Any]:
    sizes = [size if isinstance(size, int) else size.value for size in value.shape]
    return {"dtype": value.dtype.numpy().name, "shape": sizes}


@contextmanager
def _quietly() -> Iterator[None]:
    """Warnings of the translation's own deprecated parts held back."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _plain_attention(part: nn.Module) -> Iterator[None]:
    """transformers' attention written out: its fused form asks for lengths not known as yet."""
    models = [m for m in part.modules() if isinstance(m, transformers.PreTrainedModel)]
    before = [model.config._attn_implementation for model in models]
    with pretrained.only_errors():  # parts of a configuration that no model belongs to
        for model in models:
            model.set_attn_implementation("eager")
    try:
        yield
    finally:
        with pretrained.only_errors():
            for model, how in zip(models, before, strict=True):
                model.set_attn_implementation(how)
