"""Folders that transformers' own classes read, and a file beside them that uses them.

    image_encoder/            AutoModel, AutoImageProcessor: timm's models are TimmWrapperModel
    clip                      text_encoder/ (AutoModel, AutoTokenizer), projections.safetensors
    caption, recognize, vqa   connector.safetensors, with model.connector.positions also
                              positions.safetensors, language_model/ (AutoModelForCausalLM or
                              AutoModelForSeq2SeqLM, AutoTokenizer)
    exported_model.py, .json  puts them together: the engine's own ``exported_model``, as it is

No class of transformers is such a model as a whole; but a clip run with CLIP's own text encoder
pooled by its last token is VisionTextDualEncoderModel. LlavaForConditionalGeneration lets image
tokens see only those before them, and its connector is always an MLP.
"""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import engine.torchvision_ops  # noqa: F401  before transformers, which imports torchvision

import transformers  # isort: skip
from engine.config.schema import Config, Export, ImageEncoder
from engine.errors import UserError
from engine.export import exported_model
from engine.export.folder import check_task, finish, new_folder, tokenizer_of, write_json
from engine.export.images import image_section
from engine.generate.labels import label_room
from engine.models import pretrained
from engine.models.decoders.language_model import Decoder
from engine.models.decoders.prefix import PrefixDecoder
from engine.models.decoders.t5 import T5Decoder
from engine.models.decoders.t5_cross import T5CrossDecoder
from engine.models.dual_encoder import DualEncoder
from engine.models.image.huggingface import HuggingfaceImageEncoder
from engine.models.image.timm import TimmImageEncoder
from engine.models.parameters import TokenRows
from engine.models.vision_language import Positions, VisionLanguage
from engine.run import Run
from engine.tasks.language import LanguageTask
from engine.tasks.recognize import RecognizeTask
from engine.tasks.vqa import VqaTask

NAMES = ("hf",)

_IMAGE = "model.image_encoder"
_PILLOWS = {"bilinear": 2, "bicubic": 3}
_NEAR = 1e-4  # by how much a model that was read back may differ, of its greatest output
_README = """# {title}

Written by the vision-language engine {engine} from `{origin}` (step {step}), task `{task}`. Every
folder is read by `from_pretrained` of transformers; in this folder runs

```python
{code}```

Where its import fails for a torchvision that is built for another torch ("Could not import module
'AutoImageProcessor'"), install torch's own torchvision, or import `engine.torchvision_ops` first.
"""
_CODE = """from exported_model import load

model = load(".")
"""
_USES = {  # of the model, by task
    "clip": """texts = ["a photo of a dog", "a photo of a cat"]
image, text = model.image_features(["a.jpg"]), model.text_features(texts)
logits = model.logits(["a.jpg"], texts)
print(texts, logits.tolist())
""",
    "caption": 'print(model.answer("a.jpg"))\n',
    "vqa": 'print(model.answer("a.jpg", "What is it?"))\n',
    "recognize": """for label, prob in model.labels("a.jpg").items():
    print(f"{prob:.3f}  {label}")
""",
}
_WHOLE_CODE = """import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer, VisionTextDualEncoderModel

torch.set_grad_enabled(False)
model = VisionTextDualEncoderModel.from_pretrained(".").eval()
processor = AutoImageProcessor.from_pretrained(".", backend="pil")
pixels = processor(Image.open("a.jpg").convert("RGB"), return_tensors="pt").pixel_values
tokenizer = AutoTokenizer.from_pretrained(".")
texts = ["a photo of a dog", "a photo of a cat"]
given = tokenizer(texts, padding=True, truncation=True, max_length={max_length},
                  return_token_type_ids=False, return_tensors="pt")
out = model(pixel_values=pixels, **given)
image, text, logits = out.image_embeds, out.text_embeds, out.logits_per_image
print(texts, logits.tolist())
"""


def build(run: Run, folder: Path, section: Export, key: str) -> None:
    """Write ``folder``. Raises UserError: another task, parts that transformers does not have,
    other content there."""
    check_task(run, _USES, "transformers")
    processor = _processor(run.config)
    with new_folder(folder, key) as made, pretrained.only_errors():
        write_json(made / "image_encoder" / "preprocessor_config.json", processor)
        write = _clip if isinstance(run.model, DualEncoder) else _language
        if (settings := write(run, made)) is None:
            max_length = run.config.model.text_encoder.max_length
            code = _WHOLE_CODE.format(max_length=max_length)
        else:
            code = _CODE + _USES[run.task_name]
            write_json(made / "exported_model.json", settings)
            shutil.copyfile(exported_model.__file__, made / "exported_model.py")
        finish(made, run, "huggingface", _README, code=code)


# --- dual encoders


def _clip(run: Run, folder: Path) -> dict[str, Any] | None:
    """Write both towers; returns the settings of ``exported_model``, None where it is not needed:
    all is a VisionTextDualEncoderModel."""
    model: Any = run.model
    section = run.config.model.text_encoder
    image = _save_image_encoder(model.image_encoder, run.config, folder / "image_encoder")
    model.text_encoder.model.save_pretrained(folder / "text_encoder")
    tokenizer_of(run).save(folder / "text_encoder")
    text = {"pool": section.pool, "max_length": section.max_length}
    _check_texts(run, folder / "text_encoder", text)
    if image["pool"] == "model" and _joined(run, folder):
        return None
    names = ["image_projection.weight", "text_projection.weight", *model.scalar_names]
    state = model.state_dict()
    save_file({name: state[name].clone() for name in names}, folder / "projections.safetensors")
    return {"kind": "clip", "image": image, "text": text}


def _joined(run: Run, folder: Path) -> bool:
    """Put both encoders into VisionTextDualEncoderModel, where its features would be ours."""
    model: Any = run.model
    text, tokenizer = run.config.model.text_encoder, tokenizer_of(run)
    end_id = tokenizer.rows(["a text"], text.max_length)[0][0][-1]
    pooled = model.text_encoder.model.config.model_type == "clip_text_model" and text.pool == "last"
    # CLIP's pooling looks for the end of the text; a 2 means another thing there
    ended = end_id in tokenizer.special_ids and end_id != 2
    if not (pooled and ended and set(model.scalar_names) == {"logit_scale"}):
        return False
    image, texts = folder / "image_encoder", folder / "text_encoder"
    whole: Any = transformers.VisionTextDualEncoderModel.from_vision_text_pretrained(
        str(image), str(texts), projection_dim=run.config.model.projection.dim
    )
    whole.config.text_config.eos_token_id = end_id
    whole.visual_projection.load_state_dict(model.image_projection.state_dict())
    whole.text_projection.load_state_dict(model.text_projection.state_dict())
    whole.logit_scale.data = model.logit_scale.detach().reshape(())
    whole.save_pretrained(folder)
    (image / "preprocessor_config.json").rename(folder / "preprocessor_config.json")
    tokenizer.save(folder)
    for part in (image, texts):
        shutil.rmtree(part)
    return True


def _check_texts(run: Run, folder: Path, settings: dict[str, Any]) -> None:
    """Raises UserError where AutoModel reads another model than was written."""
    encoder: Any = run.model.text_encoder
    ids_BT, mask_BT = tokenizer_of(run)(["an example", "another one"], 8)
    try:
        theirs = exported_model.TextEncoder(folder, **settings)
        error = float((theirs.pooled(ids_BT, mask_BT) - encoder(ids_BT, mask_BT)).abs().max())
        why = f"its features differ by {error:.1e}"
    except (ValueError, TypeError, AttributeError, RuntimeError) as problem:
        error, why = torch.inf, str(problem).splitlines()[0]
    if not error < _NEAR:
        raise UserError(
            f"AutoModel does not read a {encoder.model.config.model_type!r} text encoder back "
            f"({why}); export.format=onnx takes any",
            key="model.text_encoder",
        )


# --- models that speak


def _language(run: Run, folder: Path) -> dict[str, Any]:
    """Write all parts; returns the settings of ``exported_model``."""
    model, task, config = run.model, run.task, run.config
    assert isinstance(model, VisionLanguage) and isinstance(task, LanguageTask)
    decoder = model.decoder
    if not isinstance(decoder, PrefixDecoder | T5Decoder | T5CrossDecoder):
        raise UserError(
            f"decoder {type(decoder).__name__} cannot be exported to transformers; causal, "
            "truncated, t5 and t5_cross can",
            key="model.decoder.name",
        )
    image = _save_image_encoder(model.image_encoder, config, folder / "image_encoder", model.layer)
    layers = _save_connector(model, config, folder)
    none = _save_language_model(decoder, folder / "language_model")
    tokenizer_of(run).save(folder / "language_model")
    settings: dict[str, Any] = {
        "kind": "prefix", "image": image, "num_dropped": 0 if model.keep_prefix else
        image["num_prefix"], "connector": layers, "prompt": _prompt(config, task),
        "start": [decoder.start_id], "end": task.eos_id, "max_length": task.max_length,
    }  # fmt: skip
    if isinstance(decoder, T5Decoder):
        ends_chunks = isinstance(task, VqaTask) and task.ends_chunks
        return settings | {"kind": "t5", "ends_chunks": ends_chunks}
    if isinstance(decoder, T5CrossDecoder):
        return settings | {"kind": "cross"}
    settings |= {"none": none, "takes_positions": decoder.positions.takes_ids}
    if isinstance(task, RecognizeTask):
        ids, section = task.prompt_ids().tolist(), config.generate
        settings["start"] = ids[: ids.index(decoder.start_id) + 1]  # the image's mark with it
        settings["labels"] = {
            "separator": task.separator_id, "room": label_room(task, section),
            "num_labels": section.num_labels,
            "first_tokens": section.first_tokens or section.num_labels,
        }  # fmt: skip
    return settings


def _prompt(config: Config, task: LanguageTask) -> str:
    if isinstance(task, RecognizeTask):
        return config.data.labels.prompt
    if isinstance(task, VqaTask):
        return task.template.question("{question}", marks=task.encodes_prompt)
    return task.template.alone(config.data.prompt.instruction)


def _save_connector(model: VisionLanguage, config: Config, folder: Path) -> list[list[Any]]:
    """Write the connector's weights, and the positions that it adds to the tokens of an image;
    returns names and sizes of its other layers."""
    connector = model.connector
    weights = {name: tensor.contiguous() for name, tensor in connector.state_dict().items()}
    save_file(weights, folder / "connector.safetensors")
    found: list[list[Any]] = []
    for layer in connector if isinstance(connector, nn.Sequential) else [connector]:
        if isinstance(layer, Positions):
            with torch.no_grad():
                tokens_1ND = model.image_tokens(torch.zeros(1, 3, *image_section(config)["size"]))
            places_1ND = layer(torch.zeros_like(tokens_1ND))
            save_file({"positions": places_1ND}, folder / "positions.safetensors")
        elif isinstance(layer, nn.Linear):
            found.append(["Linear", layer.in_features, layer.out_features, layer.bias is not None])
        elif isinstance(layer, nn.LayerNorm):
            found.append(["LayerNorm", layer.normalized_shape[0]])
        else:
            found.append([type(layer).__name__])
    return found


# --- images


def _processor(config: Config) -> dict[str, Any]:
    """Settings of AutoImageProcessor. Raises UserError for a pipeline that it cannot repeat."""
    section = image_section(config)
    settings: dict[str, Any] = {
        "image_processor_type": "CLIPImageProcessor", "do_convert_rgb": True, "do_rescale": True,
        "do_normalize": True, "image_mean": section["mean"], "image_std": section["std"],
        "do_resize": False, "do_center_crop": False,
    }  # fmt: skip
    for number, step in enumerate(section["steps"]):
        how = step.get("how")
        if (number and step["step"] != "center_crop") or how == "crop":
            raise UserError(
                "transformers resizes, then crops about the middle; let there be a resize, or a "
                "resize and center_crop, with image_aspect_ratio: pad, resize or none",
                key="transforms.image_aspect_ratio" if how else "transforms.valid_transforms",
            )
        size = step["size"]
        if isinstance(size, int):
            size = {"shortest_edge": size}
        else:
            size = {"height": size[0], "width": size[1]}
        if step["step"] == "center_crop":
            settings |= {"do_center_crop": True, "crop_size": size}
            continue
        settings |= {"do_resize": True, "size": size, "resample": _PILLOWS[step["interpolation"]]}
        if how == "pad":
            settings |= {"image_processor_type": "LlavaImageProcessor", "do_pad": True}
    return settings


def _save_image_encoder(
    encoder: nn.Module, config: Config, folder: Path, layer: int | None = None
) -> dict[str, Any]:
    """Write the folder; returns the settings of ``exported_model.ImageEncoder``.

    That gives pooled features [B, D], or with ``layer`` tokens [B, N, D]. Raises UserError where
    transformers would build another model.
    """
    section, pool = config.model.image_encoder, None
    pixels = torch.randn(2, 3, *image_section(config)["size"])
    if isinstance(encoder, TimmImageEncoder):
        theirs = _wrapped(encoder.model, section, pixels, layer is None)
        pool = "model"
    elif isinstance(encoder, HuggingfaceImageEncoder):
        theirs = encoder.model
        pool = _pooling(encoder, pixels)
    else:
        raise UserError(
            f"transformers has no {section.name!r} image encoder; timm and huggingface can "
            "be exported",
            key=f"{_IMAGE}.name",
        )
    theirs.save_pretrained(folder)
    settings: dict[str, Any] = {
        "pool": pool if layer is None else None, "layer": layer,
        "num_prefix": encoder.num_prefix_tokens,
    }  # fmt: skip
    with torch.no_grad():
        ours = encoder(pixels) if layer is None else encoder.tokens(pixels, layer)
        found = exported_model.ImageEncoder(folder, **settings)(pixels)
    same = ours.shape == found.shape
    if not (same and (ours - found).abs().max() <= _NEAR * ours.abs().max().clamp_min(1)):
        raise _another(section)
    return settings


def _pooling(encoder: HuggingfaceImageEncoder, pixels: Tensor) -> str:
    """``model``: transformers' pooler_output; ``mean`` or ``first`` of its states."""
    if encoder.pool == "mean":
        return "mean"
    with torch.no_grad():  # AutoModel may add a pooling of random weights
        pooled = getattr(encoder.model(pixel_values=pixels), "pooler_output", None)
    return "first" if pooled is None else "model"


def _another(section: ImageEncoder) -> UserError:
    return UserError(
        f"transformers builds another model of {section.tag!r} with {section.param}; "
        "export.format=onnx takes any",
        key=f"{_IMAGE}.tag",
    )


def _wrapped(model: Any, section: ImageEncoder, pixels: Tensor, pooled: bool) -> Any:
    """transformers' wrapper about a timm model of the same weights. Raises UserError."""
    options: dict[str, Any] = {**section.param, "img_size": list(pixels.shape[2:])}
    width = int(getattr(model, "head_hidden_size", None) or model.num_features)
    tag = section.tag if ":" not in section.tag else model.pretrained_cfg["architecture"]

    def made() -> Any:
        config: Any = transformers.TimmWrapperConfig(
            architecture=tag, model_args=options, do_pooling=pooled
        )
        config.hidden_size = width  # which other classes of transformers ask for
        return transformers.TimmWrapperModel(config)

    try:
        try:
            theirs = made()
        except TypeError:  # positions of any size
            del options["img_size"]
            theirs = made()
        if pooled and _pool(theirs.timm_model) != _pool(model):
            options["global_pool"] = _pool(model)
            if hasattr(model, "fc_norm"):  # its norms stay where they are
                options["fc_norm"] = not isinstance(model.fc_norm, nn.Identity)
            theirs = made()
        theirs.timm_model.load_state_dict(model.state_dict())
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise _another(section) from error
    return theirs.eval()


def _pool(model: Any) -> Any:
    pool = getattr(model, "global_pool", None)
    return getattr(pool, "pool_type", pool)


# --- language models


def _save_language_model(decoder: Decoder, folder: Path) -> int | None:
    """Write the folder; rows of single tokens stand in their table again.

    Where positions are learned, and the text's alone, one of zeros is added for the image's tokens:
    returns its number, else None.
    """
    model: Any = decoder.model
    state, config = dict(model.state_dict()), copy.deepcopy(model.config)
    none = None
    tables = decoder.positions.tables if isinstance(decoder, PrefixDecoder) else []
    for name, module in model.named_modules():
        if isinstance(module, TokenRows):
            table = f"{name.removesuffix('.token_rows')}.weight"
            state[table] = state[table].index_copy(0, module.ids_R, state.pop(f"{name}.rows_RD"))
            config.tie_word_embeddings = False  # the output layer keeps the row that it had
        elif module in tables:
            weight_PD, offset = module.weight.detach().clone(), getattr(module, "offset", 0)
            if offset:  # rows before the first, which padding alone has
                weight_PD[offset - 1], none = 0, -1
            else:
                none = len(weight_PD)
                weight_PD = torch.cat([weight_PD, torch.zeros_like(weight_PD[:1])])
                config.max_position_embeddings += 1
            state[f"{name}.weight"] = weight_PD
    model.save_pretrained(folder, state_dict=state)
    config.save_pretrained(folder)
    return none
