"""Image encoders from transformers: ViTs and the vision towers of CLIP, SigLIP and the like."""

from __future__ import annotations

import warnings
from typing import Any

import transformers
from torch import Tensor

from engine.config import schema
from engine.errors import UserError
from engine.models.pretrained import Part, without_pooling_layer
from engine.models.towers import ImageTower

_KEY = "model.image_encoder"
_KINDS = "clip_vision_model, siglip_vision_model, vit, deit, dinov2"
_CLASS_TOKENS = ("class_embedding", "cls_token", "distillation_token")


class HuggingfaceImageEncoder(ImageTower):
    """A vision transformer of transformers. Prefix tokens are class tokens and registers.

    ``pool``: ``cls`` the class token as the model normalises it, ``mean`` that of the patches,
    ``model`` the model's own pooling, ``auto`` the class token where there is one.
    """

    def __init__(self, model: Any, pool: str, trainable: bool) -> None:
        super().__init__(model, model.config.hidden_size, trainable)
        self.token_width, self.num_prefix_tokens = self.width, 0
        for name, parameter in model.named_parameters():
            last = name.rpartition(".")[2]
            if last == "register_tokens":
                self.num_prefix_tokens += parameter.shape[1]
            elif last in _CLASS_TOKENS:
                self.num_prefix_tokens += 1
        if pool == "auto":
            pool = "cls" if self.num_prefix_tokens else "model"
        self.pool, side = pool, model.config.image_size
        self.size = (side, side) if isinstance(side, int) else tuple(side)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Pooled features [B, width] of normalised images."""
        found = self._run(image_BCHW)
        if self.pool == "mean":
            return found.last_hidden_state[:, self.num_prefix_tokens :].mean(1)
        pooled = getattr(found, "pooler_output", None)
        return found.last_hidden_state[:, 0] if pooled is None else pooled

    def tokens(self, image_BCHW: Tensor, layer: int = -1) -> Tensor:
        if layer == -1:  # CLIP's is before its norm
            return self._run(image_BCHW).last_hidden_state
        states = self._run(image_BCHW, output_hidden_states=True).hidden_states
        return states[1:][layer]  # the first is what goes into the first layer

    def _run(self, image_BCHW: Tensor, **options: Any) -> Any:
        self.check_size(image_BCHW)
        return self.model(pixel_values=image_BCHW, **options)


def build(
    config: schema.ImageEncoder, *, image_size: int | tuple[int, int]
) -> HuggingfaceImageEncoder:
    """The encoder that ``config`` describes: ``tag`` a hub id or folder, ``param`` its options.

    With ``param.model_type``, and not pretrained, it is built from ``param`` alone, for images of
    ``image_size``. Raises UserError.
    """
    if config.patch_drop:
        raise UserError("models of transformers cannot drop patches; set patch_drop: 0",
                        key=f"{_KEY}.patch_drop")  # fmt: skip
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
    encoder = HuggingfaceImageEncoder(model, config.pool, config.trainable)
    if config.pool == "cls" and not encoder.num_prefix_tokens:
        raise UserError(f"{part.name} has no class token to pool by; choose mean or model",
                        key=f"{_KEY}.pool")  # fmt: skip
    encoder.check_width(config.embedding_dim, part.name, _KEY)
    if config.gradient_checkpointing and config.trainable:
        part.checkpoint_activations(model)
    return encoder


def _configuration(part: Part, image_size: int | tuple[int, int]) -> transformers.PretrainedConfig:
    """The model's configuration. Raises UserError for no vision transformer, and for another size
    of images."""
    found = part.configuration(_KINDS, {"image_size": image_size}, "vision_config")
    sizes = [getattr(found, name, None) for name in ("hidden_size", "patch_size", "image_size")]
    if None in sizes:
        raise UserError(
            f"a {found.model_type!r} model is not a vision transformer; known are {_KINDS}",
            key=part.model_key,
        )
    wanted = sizes[2]
    if part.tag is not None and wanted not in (image_size, [image_size] * 2):
        raise UserError(
            f"image encoder {part.tag!r} takes images of {wanted} pixels a side, but the "
            f"transforms put out {image_size}; let them put out {wanted}",
            key=f"{_KEY}.image_size",
        )
    return found
