"""Image encoders from transformers: ViTs and the vision towers of CLIP, SigLIP and the like."""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor, nn

import engine.torchvision_ops  # noqa: F401  before transformers, which imports torchvision

import transformers  # isort: skip
from engine.config import schema
from engine.errors import UserError
from engine.models.pretrained import Part, vision_half, without_pooling_layer
from engine.models.towers import Tower, wrong_size

_KEY = "model.image_encoder"
_KINDS = "clip_vision_model, siglip_vision_model, vit, deit, dinov2"
_CLASS_TOKENS = ("class_embedding", "cls_token", "distillation_token")


class HuggingfaceImageEncoder(Tower):
    """A vision transformer of transformers: one vector an image, or its tokens.

    ``pool``: ``cls`` the class token as the model normalises it, ``mean`` that of the patches,
    ``model`` the model's own pooling.
    """

    def __init__(self, model: Any, pool: str, trainable: bool = True) -> None:
        super().__init__(model, model.config.hidden_size, trainable)
        self.pool, self.token_width = pool, self.width
        self.num_prefix_tokens = num_prefix_tokens(model)
        side = model.config.image_size
        self.size = (side, side) if isinstance(side, int) else tuple(side)

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


def build(
    config: schema.ImageEncoder, *, image_size: int | tuple[int, int]
) -> HuggingfaceImageEncoder:
    """The encoder that ``config`` describes: ``tag`` a hub id or folder, ``param`` its options.

    With ``param.model_type``, and not pretrained, it is built from ``param`` alone, for images of
    ``image_size``. Raises UserError for a model that cannot be loaded, is not a vision transformer
    or wants images of another size, and for a width other than the declared one.
    """
    if config.patch_drop:
        raise UserError(
            "models of transformers cannot drop patches; set patch_drop: 0",
            key=f"{_KEY}.patch_drop",
        )
    alone = "model_type" in config.param and not config.pretrained
    part = Part("image encoder", _KEY, None if alone else config.tag, config.param,
                config.pretrained, option_key="param")  # fmt: skip
    found = _configuration(part, image_size)
    # a pooling layer is made for a pretext, and random in most files
    model, missing = part.load(transformers.AutoModel, found, **without_pooling_layer(found))
    if missing:
        warnings.warn(
            f"the pretrained weights of {config.tag!r} lack {', '.join(missing[:4])}: these start "
            "from random values",
            stacklevel=2,
        )
    pool = _pool(model, config.pool, part.name)
    encoder = HuggingfaceImageEncoder(model, pool, config.trainable)
    part.check_width(encoder.width, config.embedding_dim)
    if config.gradient_checkpointing and config.trainable:
        part.checkpoint_activations(model)
    return encoder


def _configuration(part: Part, image_size: int | tuple[int, int]) -> transformers.PretrainedConfig:
    """The model's configuration. Raises UserError for no vision transformer, and for another size
    of images."""
    found = part.configuration(_KINDS, {"image_size": image_size}, vision_half)
    sizes = [getattr(found, name, None) for name in ("hidden_size", "patch_size", "image_size")]
    if None in sizes:
        raise UserError(
            f"a {found.model_type!r} model is not a vision transformer; known are {_KINDS}",
            key=part.model_key,
        )
    wanted = found.image_size
    if part.tag is not None and wanted not in (image_size, [image_size] * 2):
        raise UserError(
            f"image encoder {part.tag!r} takes images of {wanted} pixels a side, but the "
            f"transforms put out {image_size}; let them put out {wanted}",
            key=f"{_KEY}.image_size",
        )
    return found


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
