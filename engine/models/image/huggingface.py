"""Image encoders from transformers: ViTs and the vision towers of CLIP, SigLIP and their kin."""

from __future__ import annotations

import inspect
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import engine.torchvision_ops  # noqa: F401  before transformers, which imports torchvision

import transformers  # isort: skip
from engine.config import schema
from engine.errors import UserError
from engine.models import pretrained
from engine.models.towers import wrong_size

_KEY = "model.image_encoder"
_KINDS = "clip_vision_model, siglip_vision_model, vit, deit, dinov2"
_CLASS_TOKENS = ("class_embedding", "cls_token", "distillation_token")


class HuggingfaceImageEncoder(nn.Module):
    """A vision transformer of transformers: one vector an image, or its tokens.

    ``pool``: ``cls`` the class token as the model normalises it, ``mean`` that of the patches,
    ``model`` the model's own pooling.
    """

    def __init__(self, model: Any, pool: str, trainable: bool = True) -> None:
        super().__init__()
        self.model, self.pool, self.trainable = model, pool, trainable
        self.width = self.token_width = int(model.config.hidden_size)
        self.num_prefix_tokens = num_prefix_tokens(model)
        side = model.config.image_size
        self.size = (side, side) if isinstance(side, int) else tuple(side)
        self.requires_grad_(trainable)
        self.train(trainable)

    def train(self, mode: bool = True) -> HuggingfaceImageEncoder:
        """A frozen tower stays in evaluation mode: no dropout."""
        return super().train(mode and self.trainable)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Pooled features [B, width] of normalised images."""
        found = self._run(image_BCHW)
        if self.pool == "mean":
            return found.last_hidden_state[:, self.num_prefix_tokens :].mean(1)
        pooled = getattr(found, "pooler_output", None)
        return found.last_hidden_state[:, 0] if pooled is None else pooled

    def tokens(self, image_BCHW: Tensor, layer: int = -1) -> Tensor:
        """All positions [B, T, D]; ``num_prefix_tokens`` (CLS) come first.

        ``layer`` counts hidden layers from the end: -1 is what transformers calls the last hidden
        state (CLIP's is before its norm), -2 what the layer before the last puts out.
        """
        if layer == -1:
            return self._run(image_BCHW).last_hidden_state
        states = self._run(image_BCHW, output_hidden_states=True).hidden_states
        return states[1:][layer]  # the first is what goes into the first layer

    def _run(self, image_BCHW: Tensor, **options: Any) -> Any:
        if image_BCHW.shape[2:] != self.size:
            raise wrong_size(image_BCHW, self.size)
        return self.model(pixel_values=image_BCHW, **options)


def num_prefix_tokens(model: nn.Module) -> int:
    """Class tokens and registers, which come before the patches."""
    count = 0
    for name, parameter in model.named_parameters():
        last = name.rpartition(".")[2]
        if last in _CLASS_TOKENS:
            count += 1
        elif last == "register_tokens":
            count += parameter.shape[1]
    return count


@dataclass
class _Section:
    """The image encoder's section as ``pretrained`` knows sections."""

    tag: str | None
    config: dict[str, Any]
    pretrained: bool


def build(
    config: schema.ImageEncoder, *, image_size: int | tuple[int, int]
) -> HuggingfaceImageEncoder:
    """The encoder that ``config`` describes: ``tag`` a hub id or folder, ``param`` its options.

    With ``param.model_type``, and not pretrained, it is built from ``param`` alone, for images of
    ``image_size``. Raises UserError for a model that cannot be had, is no vision transformer or
    wants images of another size, and for a width other than the declared one.
    """
    if config.patch_drop:
        raise UserError(
            "models of transformers cannot drop patches; set patch_drop: 0",
            key=f"{_KEY}.patch_drop",
        )
    alone = "model_type" in config.param and not config.pretrained
    section = _Section(None if alone else config.tag, config.param, config.pretrained)
    model = _model(section, _configuration(section, image_size))
    encoder = HuggingfaceImageEncoder(model, _pool(model, config.pool, pretrained.name(section)),
                                      config.trainable)  # fmt: skip
    if config.embedding_dim not in (None, encoder.width):
        raise UserError(
            f"image encoder {pretrained.name(section)} puts out vectors of {encoder.width} "
            f"numbers, not {config.embedding_dim}; set {_KEY}.embedding_dim: {encoder.width} or "
            "leave it out",
            key=f"{_KEY}.embedding_dim",
        )
    if config.gradient_checkpointing and config.trainable:
        pretrained.checkpoint_activations(model, section, key=_KEY, what="image encoder")
    return encoder


def _configuration(
    section: _Section, image_size: int | tuple[int, int]
) -> transformers.PretrainedConfig:
    try:
        found = pretrained.configuration(
            section, key=_KEY, what="image encoder", examples=_KINDS,
            more={"image_size": image_size}, half=pretrained.vision_half,
        )  # fmt: skip
    except UserError as error:  # the options of an image encoder are called param
        key = (error.key or _KEY).replace(f"{_KEY}.config", f"{_KEY}.param")
        told = str(error).replace("config.model_type", "param.model_type")
        raise UserError(told, key=key) from error
    sizes = [getattr(found, name, None) for name in ("hidden_size", "patch_size", "image_size")]
    if None in sizes:
        raise UserError(
            f"a {found.model_type!r} model is no vision transformer; known are {_KINDS}",
            key=f"{_KEY}.tag" if section.tag else f"{_KEY}.param.model_type",
        )
    wanted = found.image_size
    if section.tag is not None and wanted not in (image_size, [image_size] * 2):
        raise UserError(
            f"image encoder {section.tag!r} takes images of {wanted} pixels a side, but the "
            f"transforms put out {image_size}; let them put out {wanted}",
            key=f"{_KEY}.image_size",
        )
    return found


def _model(section: _Section, configuration: transformers.PretrainedConfig) -> Any:
    """The bare encoder. Raises UserError."""
    options: dict[str, Any] = {}
    mapped: Any = transformers.MODEL_MAPPING.get(type(configuration), None)
    if isinstance(mapped, type) and "add_pooling_layer" in inspect.signature(mapped).parameters:
        options["add_pooling_layer"] = False  # made for a pretext, and random in most files
    with pretrained.building(section, key=_KEY, what="image encoder", options="param"):
        if not section.pretrained:
            return transformers.AutoModel.from_config(configuration, **options)
        model, told = pretrained.cached_first(
            transformers.AutoModel, section.tag, config=configuration, dtype=torch.float32,
            output_loading_info=True, **options,
        )  # fmt: skip
    if missing := sorted(told["missing_keys"]):
        warnings.warn(
            f"the pretrained weights of {section.tag!r} lack {', '.join(missing[:4])}: these start "
            "from random values",
            stacklevel=3,
        )
    return model


def _pool(model: nn.Module, pool: str, name: str) -> str:
    """``auto`` decided: the class token where there is one, else the model's own pooling."""
    has_class = num_prefix_tokens(model) > 0
    if pool == "cls" and not has_class:
        raise UserError(
            f"image encoder {name} has no class token to pool by; choose mean or model",
            key=f"{_KEY}.pool",
        )
    if pool != "auto":
        return pool
    return "cls" if has_class else "model"
