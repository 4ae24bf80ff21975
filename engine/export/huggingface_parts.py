"""Parts of a model as folders that transformers' Auto classes read."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import engine.torchvision_ops  # noqa: F401  before transformers, which imports torchvision

import transformers  # isort: skip
from engine.config.schema import Config, ImageEncoder
from engine.errors import UserError
from engine.export.preprocessing import image_section
from engine.models.connectors import Positions
from engine.models.decoders.language_model import Decoder
from engine.models.image.huggingface import HuggingfaceImageEncoder
from engine.models.image.timm import TimmImageEncoder
from engine.models.token_rows import TokenRows
from engine.models.vision_language import VisionLanguage

POOLED = "encoder(pixels).pooler_output"
_IMAGE = "model.image_encoder"
_PILLOWS = {"bilinear": 2, "bicubic": 3}
_NEAR = 1e-4  # by how much a model that was read back may differ, of its greatest output


def processor(config: Config) -> dict[str, Any]:
    """Settings of AutoImageProcessor. Raises UserError for a pipeline that it has not."""
    section = image_section(config)
    told: dict[str, Any] = {
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
        if step["step"] == "center_crop":
            told |= {"do_center_crop": True, "crop_size": _size(step["size"])}
            continue
        told |= {"do_resize": True, "size": _size(step["size"])}
        told["resample"] = _PILLOWS[step["interpolation"]]
        if how == "pad":
            told |= {"image_processor_type": "LlavaImageProcessor", "do_pad": True}
    return told


def _size(size: int | list[int]) -> dict[str, int]:
    if isinstance(size, int):
        return {"shortest_edge": size}
    return {"height": size[0], "width": size[1]}


# --- image encoders


def save_image_encoder(encoder: Any, config: Config, folder: Path, layer: int | None = None) -> str:
    """Write the folder; returns the expression of what ``encoder`` there gives for ``pixels``.

    That is pooled features [B, D], or with ``layer`` tokens [B, N, D]. Raises UserError where
    transformers would build another model.
    """
    section = config.model.image_encoder
    of_timm = isinstance(encoder, TimmImageEncoder)
    if not (of_timm or isinstance(encoder, HuggingfaceImageEncoder)):
        raise UserError(
            f"transformers has no {section.name!r} image encoder; timm and huggingface have a form "
            "there",
            key=f"{_IMAGE}.name",
        )
    pixels = torch.randn(2, 3, *image_section(config)["size"])
    theirs = _wrapped(encoder.model, section, pixels, layer is None) if of_timm else encoder.model
    theirs.save_pretrained(folder)
    read: Any = transformers.AutoModel.from_pretrained(folder)
    again: Any = TimmImageEncoder(read.timm_model) if of_timm else HuggingfaceImageEncoder(read, "")
    again.eval()
    with torch.no_grad():
        pairs = [(one.tokens(pixels, layer or -1) for one in (encoder, again))]
        if layer is None and of_timm:
            pairs.append(one(pixels) for one in (encoder, again))
        alike = all(_alike(*pair) for pair in pairs)
        if not alike:
            raise _another(section)
        return _pooled(encoder, pixels) if layer is None else _tokens(encoder, pixels, layer)


def _alike(ours: Tensor, theirs: Tensor) -> bool:
    same = ours.shape == theirs.shape
    return same and bool((ours - theirs).abs().max() <= _NEAR * ours.abs().max().clamp_min(1))


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
        told: dict[str, Any] = {"architecture": tag, "model_args": options, "do_pooling": pooled}
        told["hidden_size"] = width  # which other classes of transformers ask for
        return transformers.TimmWrapperModel(transformers.TimmWrapperConfig(**told))

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


def _pooled(encoder: Any, pixels: Tensor) -> str:
    if isinstance(encoder, TimmImageEncoder):
        return POOLED
    if encoder.pool == "mean":
        return f"encoder(pixels).last_hidden_state[:, {encoder.num_prefix_tokens} :].mean(1)"
    found = encoder.model(pixel_values=pixels)  # AutoModel may add a pooling of random weights
    if getattr(found, "pooler_output", None) is None:
        return "encoder(pixels).last_hidden_state[:, 0]"
    return POOLED


def _tokens(encoder: Any, pixels: Tensor, layer: int) -> str:
    if layer == -1:
        states = "encoder(pixels).last_hidden_state"
        if not isinstance(encoder, TimmImageEncoder):
            return states
        if encoder.model.forward_features(pixels).ndim == 3:
            return states
        last = getattr(encoder.model, "output_fmt", "NCHW") == "NHWC"
        return states + (".flatten(1, 2)" if last else ".flatten(2).transpose(1, 2)")
    states = "encoder(pixels, output_hidden_states=True"
    if isinstance(encoder, TimmImageEncoder):  # patches and class tokens apart
        states += ', norm=False, output_fmt="NLC", return_prefix_tokens=True'
        return f"torch.cat({states}).hidden_states[{layer}][::-1], 1)"
    return f"{states}).hidden_states[{layer}]"


def save_positions(model: VisionLanguage, config: Config, path: Path) -> str:
    """Write what the connector adds to the tokens of an image; returns the code that adds it."""
    layers = list(model.connector) if isinstance(model.connector, nn.Sequential) else []
    for layer in layers:
        if isinstance(layer, Positions):
            with torch.no_grad():
                tokens_1ND = model.image_tokens(torch.zeros(1, 3, *image_section(config)["size"]))
            save_file({"positions": layer(torch.zeros_like(tokens_1ND))}, path)
            return f' + load_file("{path.name}")["positions"]'
    return ""


# --- language models


def save_language_model(decoder: Decoder, folder: Path) -> int | None:
    """Write the folder; rows of single tokens stand in their table again.

    Where positions are learned, and the text's alone, one of zeros is added for the image's tokens:
    returns its number, else None.
    """
    model: Any = decoder.model
    state = dict(model.state_dict())
    tied, none, more = True, None, 0
    for name, module in model.named_modules():
        if isinstance(module, TokenRows):
            table = f"{name.removesuffix('.token_rows')}.weight"
            state[table] = state[table].index_copy(0, module.ids_R, state.pop(f"{name}.rows_RD"))
            tied = False  # the output layer keeps the row that it had
        elif module in getattr(getattr(decoder, "positions", None), "tables", []):
            none, more, state[f"{name}.weight"] = _with_none(module)
    model.save_pretrained(folder, state_dict=state)
    config = copy.deepcopy(model.config)
    config.tie_word_embeddings = tied and config.tie_word_embeddings
    if more:
        config.max_position_embeddings += more
    config.save_pretrained(folder)
    return none


def _with_none(table: Any) -> tuple[int, int, Tensor]:
    """The number of a position of zeros, how many rows it takes, and the table with it."""
    weight_PD, offset = table.weight.detach().clone(), getattr(table, "offset", 0)
    if offset:  # rows before the first, which padding alone has
        weight_PD[offset - 1] = 0
        return -1, 0, weight_PD
    return len(weight_PD), 1, torch.cat([weight_PD, torch.zeros_like(weight_PD[:1])])
