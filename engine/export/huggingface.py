"""Folders that transformers' own classes read, and a README whose code uses them.

    image_encoder/            AutoModel, AutoImageProcessor: timm's models are TimmWrapperModel
    clip                      text_encoder/ (AutoModel, AutoTokenizer), projections.safetensors
    caption, recognize, vqa   connector.safetensors, with model.connector.positions also
                              positions.safetensors, language_model/ (AutoModelForCausalLM or
                              AutoModelForSeq2SeqLM, AutoTokenizer)

No class of transformers is such a model as a whole, and the README's code puts the parts together;
but a clip run with CLIP's own text encoder pooled by its last token is VisionTextDualEncoderModel.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import engine.torchvision_ops  # before transformers, which imports torchvision

import transformers  # isort: skip
from engine.config.schema import Config, Export
from engine.errors import UserError
from engine.export import huggingface_code as code
from engine.export import huggingface_parts as parts
from engine.export.folder import new_folder, write_manifest
from engine.export.trained import Trained
from engine.generate.labels import label_room
from engine.models import pretrained
from engine.models.decoders.t5 import T5Decoder
from engine.models.decoders.t5_cross import T5CrossDecoder
from engine.models.dual_encoder import DualEncoder
from engine.models.vision_language import VisionLanguage
from engine.tasks.recognize import RecognizeTask
from engine.tasks.vqa import VqaTask

NAMES = ("hf",)

_TASKS = ("clip", "caption", "recognize", "vqa")
_README = """# {title}

Written by the vision-language engine {version} from `{origin}` (step {step}), task `{task}`. Every
folder is read by `from_pretrained` of transformers; in this folder runs

```python
{code}```

Where its import fails for a torchvision that is built for another torch ("Could not import module
'AutoImageProcessor'"), install torch's own torchvision, or import `engine.torchvision_ops` first.
"""


def build(trained: Trained, folder: Path, section: Export, key: str) -> None:
    """Write ``folder``. Raises UserError: another task, parts transformers has not, other content
    there."""
    if trained.task_name not in _TASKS:
        raise UserError(
            f"--task={trained.task_name} has no form in transformers; {', '.join(_TASKS)} have one",
            key="export.format",
        )
    processor = parts.processor(trained.config)
    with new_folder(folder, key) as made, pretrained.only_errors():
        (made / "image_encoder").mkdir()
        (made / "image_encoder" / "preprocessor_config.json").write_text(
            json.dumps(processor, indent=1) + "\n", encoding="utf8"
        )
        write = _clip if isinstance(trained.model, DualEncoder) else _language
        program = write(trained, made)
        told = {
            "version": engine.__version__, "origin": trained.origin, "step": trained.step,
            "task": trained.task_name, "code": program,
            "title": trained.config.data.exp_name or trained.task_name,
        }  # fmt: skip
        (made / "README.md").write_text(_README.format(**told), encoding="utf8")
        write_manifest(made, {"format": "huggingface", "task": trained.task_name,
                              "engine": engine.__version__, "origin": trained.origin,
                              "step": trained.step})  # fmt: skip


def _clip(trained: Trained, folder: Path) -> str:
    model: Any = trained.model
    section = trained.config.model.text_encoder
    pooled = parts.save_image_encoder(model.image_encoder, trained.config, folder / "image_encoder")
    model.text_encoder.model.save_pretrained(folder / "text_encoder")
    trained.task.tokenizer.save(folder / "text_encoder")
    _check_texts(trained, folder / "text_encoder")
    if pooled == parts.POOLED and _joined(trained, folder):
        return code.DUAL.substitute(max_length=section.max_length)
    names = ["image_projection.weight", "text_projection.weight", *model.scalar_names]
    state = model.state_dict()
    save_file({name: state[name].clone() for name in names}, folder / "projections.safetensors")
    logits = "image @ text.T"
    if "logit_scale" in model.scalar_names:
        logits = f'more["logit_scale"].exp() * {logits}'
    if "logit_bias" in model.scalar_names:
        logits += ' + more["logit_bias"]'
    text = code.POOLED[section.pool]
    return code.START.substitute() + code.CLIP.substitute(
        image=pooled, text=f"({text})" if " / " in text else text, logits=logits,
        max_length=section.max_length,
    )  # fmt: skip


def _joined(trained: Trained, folder: Path) -> bool:
    """Put both encoders into VisionTextDualEncoderModel, where its features would be ours."""
    model: Any = trained.model
    text = trained.config.model.text_encoder
    ids = trained.task.tokenizer.rows(["a text"], text.max_length)[0][0]
    pooled = model.text_encoder.model.config.model_type == "clip_text_model" and text.pool == "last"
    # CLIP's pooling looks for the end of the text; 2 has another meaning to it
    ended = ids[-1] in trained.task.tokenizer.special_ids and ids[-1] != 2
    if not (pooled and ended and set(model.scalar_names) == {"logit_scale"}):
        return False
    image, texts = folder / "image_encoder", folder / "text_encoder"
    whole: Any = transformers.VisionTextDualEncoderModel.from_vision_text_pretrained(
        str(image), str(texts), projection_dim=trained.config.model.projection.dim
    )
    whole.config.text_config.eos_token_id = ids[-1]
    whole.visual_projection.load_state_dict(model.image_projection.state_dict())
    whole.text_projection.load_state_dict(model.text_projection.state_dict())
    whole.logit_scale.data = model.logit_scale.detach().reshape(())
    whole.save_pretrained(folder)
    (image / "preprocessor_config.json").rename(folder / "preprocessor_config.json")
    trained.task.tokenizer.save(folder)
    for part in (image, texts):
        shutil.rmtree(part)
    return True


def _check_texts(trained: Trained, folder: Path) -> None:
    """Raises UserError where AutoModel reads another model than was written."""
    encoder: Any = trained.model.text_encoder
    ids_BT, mask_BT = trained.task.tokenizer(["an example", "another one"], 8)
    try:
        theirs = transformers.AutoModel.from_pretrained(folder).eval()
        with torch.no_grad():
            found = theirs(input_ids=ids_BT, attention_mask=mask_BT).last_hidden_state
            error = (found - encoder.tokens(ids_BT, mask_BT)).abs().max()
    except (ValueError, TypeError, AttributeError, RuntimeError) as problem:
        error, told = torch.inf, str(problem).splitlines()[0]
    else:
        told = f"its states differ by {float(error):.1e}"
    if not error < 1e-4:
        raise UserError(
            f"AutoModel does not read a {encoder.model.config.model_type!r} text encoder back "
            f"({told}); export.format=onnx takes any",
            key="model.text_encoder",
        )


def _language(trained: Trained, folder: Path) -> str:
    model, task = trained.model, trained.task
    assert isinstance(model, VisionLanguage)
    decoder = model.decoder
    states = parts.save_image_encoder(
        model.image_encoder, trained.config, folder / "image_encoder", layer=model.layer
    )
    save_file(
        {name: tensor.contiguous() for name, tensor in model.connector.state_dict().items()},
        folder / "connector.safetensors",
    )
    positions = parts.save_positions(model, trained.config, folder / "positions.safetensors")
    none = parts.save_language_model(decoder, folder / "language_model")
    task.tokenizer.save(folder / "language_model")
    encoder: Any = model.image_encoder
    kept = "" if model.keep_prefix else f"[:, {encoder.num_prefix_tokens} :]"
    of_t5 = isinstance(decoder, T5Decoder | T5CrossDecoder)
    auto = "AutoModelForSeq2SeqLM" if of_t5 else "AutoModelForCausalLM"
    image = code.IMAGE.substitute(
        states=states, connector=code.expression(model.connector), kept=kept, positions=positions
    )
    program = code.START.substitute() + image + code.MODEL.substitute(auto=auto)
    return program + _said(trained, decoder, none)


def _prompt(config: Config, task: Any) -> str:
    if isinstance(task, RecognizeTask):
        return config.data.labels.prompt
    if isinstance(task, VqaTask):
        return task.template.question("{question}", marks=task.encodes_prompt)
    return task.template.alone(config.data.prompt.instruction)


def _said(trained: Trained, decoder: Any, none: int | None) -> str:
    """The code that asks the language model."""
    task = trained.task
    given = {"prompt": repr(_prompt(trained.config, task)), "max_length": task.max_length,
             "start": decoder.start_id, "end": task.eos_id}  # fmt: skip
    if trained.task_name == "vqa":
        given["prompt"] += '.replace("{question}", "What is it?")'
    if isinstance(decoder, T5Decoder):
        ended = f" + [{task.eos_id}]" if task.ends_chunks else ""
        return code.QUESTION.substitute(given, ended=ended)
    if isinstance(decoder, T5CrossDecoder):
        return code.CROSS.substitute(given)
    positions = code.POSITIONS if none is None else code.POSITIONS_OF_TEXT.substitute(none=none)
    following = code.NEXT
    if not decoder.positions.takes_ids:
        positions = following = ""
    if trained.task_name != "recognize":
        told = code.CAPTION.substitute(given, next=following)
    else:
        ids = task.prompt_ids().tolist()
        mark = ids[: ids.index(decoder.start_id) + 1]
        given["start"] = ", ".join(map(str, mark))
        section = trained.config.generate
        told = code.LABELS.substitute(
            next=following, separator=task.separator_id, room=label_room(task, section),
            num_labels=section.num_labels, first_tokens=section.first_tokens or section.num_labels,
        )  # fmt: skip
    return code.PREFIX.substitute(given, positions=positions) + told
