"""ONNX: one graph a part, a manifest of all it takes to use them, and the run's tokenizer.

    clip                 image_encoder.onnx  text_encoder.onnx
    caption, recognize   image_encoder.onnx  decoder.onnx

``python -m engine.export.run FOLDER IMAGES…`` and ``engine.export.onnx_runner`` use the folder
without torch; so can any other ONNX runtime. Sizes that may change from call to call are found by
torch.export and given names here, in the file as in the manifest.
"""

from __future__ import annotations

import importlib
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import exp
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import engine.torchvision_ops  # noqa: F401  before transformers, which imports torchvision

import transformers  # isort: skip
from engine.config.schema import Export
from engine.data.text.tokenizer import FOLDER as TOKENIZER_FOLDER
from engine.errors import FaultError, UserError
from engine.export import steps
from engine.export.folder import check_task, finish, new_folder, tokenizer_of
from engine.export.images import image_section
from engine.export.steps import Argument
from engine.generate.labels import label_room
from engine.models import pretrained
from engine.models.dual_encoder import DualEncoder
from engine.models.vision_language import VisionLanguage
from engine.run import Run
from engine.tasks.caption import CaptionTask
from engine.tasks.language import LanguageTask
from engine.tasks.recognize import RecognizeTask

LIMIT = 2_000_000_000  # bytes of a file; protobuf's own bound is 2³¹ − 1, with the graph
_README = """# {title}

Written by the vision-language engine {engine} from `{origin}` (step {step}), task `{task}`, ONNX
opset {opset}. `manifest.json` says what goes in and out of each graph, how images are prepared,
which ids are special, and the SHA-256 of every file.

Without torch, with numpy, pillow, tokenizers and onnxruntime, in this folder:

    python -m engine.export.run . IMAGE…

    from engine.export.onnx_runner import open_folder
    model = open_folder(".")
"""


def build(run: Run, folder: Path, section: Export, key: str) -> None:
    """Write ``folder``. Raises UserError: another task, no ONNX here, other content there."""
    for package in ("onnx", "onnxscript"):
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise UserError(
                f"format onnx needs {package} ({error}): pip install -e .[onnx]",
                key="export.format",
            ) from error
    check_task(run, _TASKS, "ONNX")
    image = image_section(run.config)
    with new_folder(folder, key) as made:
        write = _Writer(made, section, image["size"])
        sections = _TASKS[run.task_name](run, write)
        tokenizer_of(run).save(made / TOKENIZER_FOLDER)
        parts = {"image": image, **sections, "graphs": write.graphs}
        more: dict[str, Any] = {"torch": torch.__version__, "opset": section.opset}
        finish(made, run, "onnx", _README, parts=parts, **more)


# --- parts of a model as functions of tensors alone


class _Part(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model


class ImageFeatures(_Part):
    """Normalised images [B, C, H, W] → L2-normed features [B, D]."""

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.model({"image_BCHW": pixel_values})["image_BD"]


class TextFeatures(_Part):
    """Token ids and their mask [B, T] → L2-normed features [B, D]."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        batch = {"input_ids_BT": input_ids, "attention_mask_BT": attention_mask}
        return self.model(batch)["text_BD"]


class ImageTokens(_Part):
    """Normalised images [B, C, H, W] → what the decoder is given of them, [B, N, D]."""

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.model.image_tokens(pixel_values)


class _Writer:
    """Puts graphs into the folder and keeps what the manifest says of them."""

    def __init__(self, folder: Path, section: Export, size: list[int]) -> None:
        self.folder, self.section, self.size = folder, section, size
        self.graphs: dict[str, Any] = {}

    def __call__(
        self, name: str, part: nn.Module, given: list[Argument], outputs: list[str],
        past: Sequence[Argument] = (),
    ) -> None:  # fmt: skip
        self.graphs[name] = write_graph(
            part.eval(), given, outputs, self.folder / f"{name}.onnx", past=past,
            opset=self.section.opset, beside=self.section.external_data == "always",
        )  # fmt: skip

    def image(self, part: nn.Module, output: str) -> Tensor:
        """The image encoder's graph; returns what it gives for its example."""
        image_BCHW = torch.zeros(2, 3, *self.size)
        self("image_encoder", part, [Argument("pixel_values", image_BCHW, {0: "batch"})], [output])
        with torch.no_grad():
            return part(image_BCHW)


def _clip(run: Run, write: _Writer) -> dict[str, Any]:
    model, tokenizer = run.model, tokenizer_of(run)
    assert isinstance(model, DualEncoder)
    max_length = run.config.model.text_encoder.max_length
    write.image(ImageFeatures(model), "image_features")
    ids_BT, mask_BT = tokenizer(["an example", "another one"], max_length)
    sizes = {0: "batch", 1: "length"}
    given = [Argument("input_ids", ids_BT, sizes), Argument("attention_mask", mask_BT, sizes)]
    write("text_encoder", TextFeatures(model), given, ["text_features"])
    known = {name: float(getattr(model, name)) for name in model.scalar_names}
    scale = exp(known["logit_scale"]) if "logit_scale" in known else 1.0
    text = {"max_length": max_length, "pad_id": tokenizer.pad_id}
    return {
        "text": {"tokenizer": TOKENIZER_FOLDER, **text},
        "logits": {"scale": scale, "bias": known.get("logit_bias")},
    }


def _decoder(run: Run, write: _Writer) -> dict[str, Any]:
    """Both graphs of a model that speaks; what its text side needs in every task."""
    model, task = run.model, run.task
    assert isinstance(model, VisionLanguage) and isinstance(task, LanguageTask)
    num_image = write.image(ImageTokens(model), "image_tokens").shape[1]
    step = steps.step_of(model.decoder, num_image)
    given, past, outputs = steps.arguments_of(step, num_image, model.decoder.width)
    write("decoder", step, given, outputs, past)
    return {
        "tokenizer": TOKENIZER_FOLDER, "pad_id": tokenizer_of(run).pad_id,
        "start_id": model.decoder.start_id, "max_length": task.max_length,
    }  # fmt: skip


def _caption(run: Run, write: _Writer) -> dict[str, Any]:
    prompt, task = run.config.data.prompt, run.task
    assert isinstance(task, CaptionTask)
    text = _decoder(run, write)
    ids_BP, _ = task.prompts([prompt.instruction])
    text |= {
        "end_id": task.eos_id, "template": prompt.template, "instruction": prompt.instruction,
        "prompt_ids": ids_BP[0].tolist(),
    }  # fmt: skip
    return {"text": text}


def _recognize(run: Run, write: _Writer) -> dict[str, Any]:
    task, section = run.task, run.config.generate
    assert isinstance(task, RecognizeTask)
    text = _decoder(run, write)
    text |= {
        "separator_id": task.separator_id, "prompt": run.config.data.labels.prompt,
        "prompt_ids": task.prompt_ids().tolist(),
    }  # fmt: skip
    labels = {
        "room": label_room(task, section), "num_labels": section.num_labels,
        "first_tokens": section.first_tokens,  # none: as many as labels are asked for
    }  # fmt: skip
    return {"text": text, "labels": labels}


_TASKS: dict[str, Callable[[Run, _Writer], dict[str, Any]]] = {
    "clip": _clip, "caption": _caption, "recognize": _recognize,
}  # fmt: skip


# --- their translation


def write_graph(
    part: nn.Module, arguments: Sequence[Argument], outputs: Sequence[str], path: Path, *,
    past: Sequence[Argument] = (), opset: int, beside: bool,
) -> dict[str, Any]:  # fmt: skip
    """Translate ``part`` to the file ``path``; returns its shapes for the manifest.

    ``past`` are the items of its last argument, a list. Weights are in ``path``.data where they
    come to 2 GB or more, or ``beside`` asks for it.
    """
    everything = [*arguments, *past]
    examples: list[Any] = [argument.example for argument in everything]
    sizes: list[Any] = [
        dict.fromkeys(argument.sizes, torch.export.Dim.DYNAMIC) for argument in everything
    ]
    if past:
        examples, sizes = (
            [*each[: len(arguments)], each[len(arguments) :]] for each in (examples, sizes)
        )
    with torch.no_grad(), warnings.catch_warnings(), _plain_attention(part):
        warnings.simplefilter("ignore")  # of the translation's own deprecated parts
        program = torch.onnx.export(
            part, tuple(examples), input_names=[argument.name for argument in everything],
            output_names=list(outputs), dynamic_shapes=tuple(sizes), opset_version=opset,
            dynamo=True, verbose=False,
        )  # fmt: skip
    if program is None:
        raise FaultError("torch.onnx.export gave no program")
    graph = program.model.graph
    _name_sizes(graph, everything)
    weights = (value.const_value for value in graph.initializers.values())
    num_bytes = sum(weight.nbytes for weight in weights if weight is not None)
    program.save(path, external_data=beside or num_bytes >= LIMIT)
    described = {
        kind: {value.name: _shape(value) for value in values}
        for kind, values in (("inputs", graph.inputs), ("outputs", graph.outputs))
    }
    return {"file": path.name, **described}


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
            for model, how in zip(models, before, strict=True):
                model.set_attn_implementation(how)
