"""ONNX: one graph a part, a manifest of all it takes to use them, and the run's tokenizer.

    clip                 image_encoder.onnx  text_encoder.onnx
    caption, recognize   image_encoder.onnx  decoder.onnx

``python -m engine.export.run FOLDER IMAGES…`` and ``engine.export.onnx_runner`` use the folder
without torch; so can any other ONNX runtime.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from math import exp
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine.config.schema import Export
from engine.data.text.tokenizer import FOLDER as TOKENIZER_FOLDER
from engine.errors import UserError
from engine.export import graphs, steps
from engine.export.folder import described, new_folder, tokenizer_of, write_manifest, write_readme
from engine.export.graphs import Argument
from engine.export.images import image_section
from engine.generate.labels import label_room
from engine.models.dual_encoder import DualEncoder
from engine.models.vision_language import VisionLanguage
from engine.run import Run
from engine.tasks.caption import CaptionTask
from engine.tasks.language import LanguageTask
from engine.tasks.recognize import RecognizeTask

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
    if run.task_name not in _TASKS:
        raise UserError(
            f"--task={run.task_name} cannot be exported to ONNX; {', '.join(_TASKS)} can",
            key="export.format",
        )
    image = image_section(run.config)
    with new_folder(folder, key) as made:
        write = _Writer(made, section, tuple(image["size"]))
        sections = _TASKS[run.task_name](run, write)
        tokenizer_of(run).save(made / TOKENIZER_FOLDER)
        values = described(run, "onnx", torch=torch.__version__, opset=section.opset)
        write_readme(made, _README, run, **values)
        write_manifest(made, {**values, "image": image, **sections, "graphs": write.graphs})


class _Writer:
    """Puts graphs into the folder and keeps what the manifest says of them."""

    def __init__(self, folder: Path, section: Export, size: tuple[int, int]) -> None:
        self.folder, self.section, self.size = folder, section, size
        self.graphs: dict[str, Any] = {}

    def __call__(
        self, name: str, part: nn.Module, given: list[Argument], outputs: list[str],
        past: list[Argument] | None = None,
    ) -> None:  # fmt: skip
        self.graphs[name] = graphs.write(
            part.eval(), given, outputs, self.folder / f"{name}.onnx", past=past or (),
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
    write.image(graphs.ImageFeatures(model), "image_features")
    ids_BT, mask_BT = tokenizer(["an example", "another one"], _max_length(run))
    sizes = {0: "batch", 1: "length"}
    write(
        "text_encoder", graphs.TextFeatures(model),
        [Argument("input_ids", ids_BT, sizes), Argument("attention_mask", mask_BT, sizes)],
        ["text_features"],
    )  # fmt: skip
    known = {name: float(getattr(model, name)) for name in model.scalar_names}
    scale = exp(known["logit_scale"]) if "logit_scale" in known else 1.0
    logits = {"scale": scale, "bias": known.get("logit_bias")}
    text = {"max_length": _max_length(run), "pad_id": tokenizer.pad_id}
    return {"text": {"tokenizer": TOKENIZER_FOLDER, **text}, "logits": logits}


def _max_length(run: Run) -> int:
    return run.config.model.text_encoder.max_length


def _decoder(run: Run, write: _Writer) -> dict[str, Any]:
    """Both graphs of a model that speaks; what its text side needs in every task."""
    model, task = run.model, run.task
    assert isinstance(model, VisionLanguage) and isinstance(task, LanguageTask)
    num_image = write.image(graphs.ImageTokens(model), "image_tokens").shape[1]
    step = steps.step_of(model.decoder, num_image)
    given, past, outputs = steps.arguments_of(step, num_image, model.decoder.width)
    write("decoder", step, given, outputs, past)
    return {
        "tokenizer": TOKENIZER_FOLDER,
        "pad_id": tokenizer_of(run).pad_id,
        "start_id": model.decoder.start_id,
        "max_length": task.max_length,
    }


def _caption(run: Run, write: _Writer) -> dict[str, Any]:
    prompt, task = run.config.data.prompt, run.task
    assert isinstance(task, CaptionTask)
    text = _decoder(run, write)
    ids_BP, _ = task.prompts([prompt.instruction])
    return {
        "text": text
        | {
            "end_id": task.eos_id,
            "template": prompt.template,
            "instruction": prompt.instruction,
            "prompt_ids": ids_BP[0].tolist(),
        }
    }


def _recognize(run: Run, write: _Writer) -> dict[str, Any]:
    task, section = run.task, run.config.generate
    assert isinstance(task, RecognizeTask)
    text = _decoder(run, write)
    return {
        "text": text
        | {
            "separator_id": task.separator_id,
            "prompt": run.config.data.labels.prompt,
            "prompt_ids": task.prompt_ids().tolist(),
        },
        "labels": {
            "room": label_room(task, section),
            "num_labels": section.num_labels,
            "first_tokens": section.first_tokens,  # none: as many as labels are asked for
        },
    }


_TASKS: dict[str, Callable[[Run, _Writer], dict[str, Any]]] = {
    "clip": _clip,
    "caption": _caption,
    "recognize": _recognize,
}
