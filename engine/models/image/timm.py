"""Image encoders from timm: any of its models by tag, pretrained or from random weights."""

from __future__ import annotations

import inspect
import logging
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import timm
import torch
from torch import Tensor

from engine.config import schema
from engine.errors import UserError, first_line
from engine.models.towers import ImageTower
from engine.registry import nearest

NAMES = ("timm_modelzoo",)

_KEY = "model.image_encoder"
_SET_ELSEWHERE = {
    "img_size": f"set {_KEY}.image_size",
    "patch_drop_rate": f"set {_KEY}.patch_drop",
    "pretrained": f"set {_KEY}.pretrained",
    "num_classes": "the encoder has no classifier",
    "features_only": "the encoder gives one vector an image",
    "in_chans": "images have three channels",
    "checkpoint_path": f"set {_KEY}.init, or param.pretrained_cfg_overlay.file with pretrained",
}


class TimmImageEncoder(ImageTower):
    """A timm model without its classifier."""

    def __init__(self, model: Any, trainable: bool = True) -> None:
        # MobileNetV3 and the like widen the features behind the pooling
        width = getattr(model, "head_hidden_size", None) or model.num_features
        super().__init__(model, width, trainable)
        self.token_width = int(model.num_features)
        self.num_prefix_tokens = int(getattr(model, "num_prefix_tokens", 0))
        patches: Any = getattr(model, "patch_embed", None)
        if getattr(patches, "strict_img_size", False):
            self.size = patches.img_size

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Pooled features [B, width] of normalised images."""
        self.check_size(image_BCHW)
        return self.model(image_BCHW)

    def tokens(self, image_BCHW: Tensor, layer: int = -1) -> Tensor:
        self.check_size(image_BCHW)
        if layer < -1:
            patches_BTD, prefix_BPD = self.model.forward_intermediates(
                image_BCHW, indices=-layer, norm=False, output_fmt="NLC",
                intermediates_only=True, return_prefix_tokens=True,
            )[0]  # fmt: skip
            return torch.cat([prefix_BPD, patches_BTD], dim=1)
        features = self.model.forward_features(image_BCHW)
        if features.ndim == 4:
            last = getattr(self.model, "output_fmt", "NCHW") == "NHWC"
            return features.flatten(1, 2) if last else features.flatten(2).transpose(1, 2)
        return features


def build(config: schema.ImageEncoder, *, image_size: int) -> TimmImageEncoder:
    """The encoder that ``config`` describes, for square images of ``image_size`` pixels. Raises
    UserError for what timm does not know or cannot load."""
    _check(config)
    try:
        with _complete_weights(config), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of deprecated tags, which timm maps to today's
            model = _create(config, image_size)
    except (TypeError, ValueError, AssertionError, RuntimeError, OSError) as error:
        raise _explained(error, config) from error
    _set_pool(model, config)
    encoder = TimmImageEncoder(model, config.trainable)
    encoder.check_width(config.embedding_dim, f"model {config.tag!r}", _KEY)
    if config.gradient_checkpointing and config.trainable:
        if not hasattr(model, "set_grad_checkpointing"):
            raise _fault(config, "gradient_checkpointing", "cannot checkpoint; set it to false")
        model.set_grad_checkpointing(True)
    return encoder


def _fault(config: schema.ImageEncoder, key: str, text: str) -> UserError:
    return UserError(f"model {config.tag!r} {text}", key=f"{_KEY}.{key}")


def _check(config: schema.ImageEncoder) -> None:
    name = config.tag.split(".")[0]
    if ":" not in config.tag and not timm.is_model(name):
        hint = nearest(name, timm.list_models())
        hint = hint if hint.startswith("did") else "timm.list_models() lists those there are"
        raise UserError(f"timm has no model {config.tag!r}; {hint}", key=f"{_KEY}.tag")
    for option in config.param:
        if option in _SET_ELSEWHERE:
            raise UserError(f"param {option!r} is not given here: {_SET_ELSEWHERE[option]}",
                            key=f"{_KEY}.param.{option}")  # fmt: skip
    if config.patch_drop and not config.trainable:
        raise UserError(f"patch_drop {config.patch_drop} does nothing where trainable is false",
                        key=f"{_KEY}.patch_drop")  # fmt: skip


def _create(config: schema.ImageEncoder, image_size: int) -> Any:
    options: dict[str, Any] = {"num_classes": 0, **config.param}
    if config.patch_drop:
        options["patch_drop_rate"] = config.patch_drop
    try:
        # models with positions fixed by the size take it (and resample pretrained positions)
        return timm.create_model(config.tag, config.pretrained, img_size=image_size, **options)
    except TypeError as error:
        if "'img_size'" not in str(error):
            raise
        return timm.create_model(config.tag, config.pretrained, **options)


def _explained(error: Exception, config: schema.ImageEncoder) -> UserError:
    """timm's error as one that says what to change."""
    unexpected = re.search(r"(\w+)\.__init__\(\) got an unexpected .* '(\w+)'", str(error))
    if unexpected:
        class_name, option = unexpected.groups()
        if option == "patch_drop_rate":
            return _fault(config, "patch_drop", "cannot drop patches; set patch_drop: 0")
        hint = nearest(option, _options(config.tag, class_name))
        return _fault(config, f"param.{option}", f"has no option {option!r}; {hint}")
    if isinstance(error, OSError):
        text = (f"cannot get model {config.tag!r}: {first_line(error)}; download it where there is "
                "network and copy the cache (HF_HOME), name a folder by tag 'local-dir:/path', or "
                "set pretrained: false")  # fmt: skip
        return UserError(text, key=f"{_KEY}.{'pretrained' if config.pretrained else 'tag'}")
    text = f"cannot be built by timm with {config.param or 'no param'}: {error}"
    return _fault(config, "param" if config.param else "tag", text)


def _options(tag: str, class_name: str) -> list[str]:
    """What the class that refused an option does take."""
    name = tag.split(".")[0]
    module = sys.modules[timm.model_entrypoint(name).__module__] if timm.is_model(name) else timm
    found = getattr(module, class_name, None)
    names = set(inspect.signature(found).parameters) if found else set()
    return sorted(names - _SET_ELSEWHERE.keys() - {"args", "kwargs"})


@contextmanager
def _complete_weights(config: schema.ImageEncoder) -> Iterator[None]:
    """Warn of weights that a pretrained file does not hold: timm writes that to its log alone."""
    messages: list[str] = []
    logger = logging.getLogger("timm.models._builder")
    level = logger.level

    def keep(record: logging.LogRecord) -> bool:
        messages.append(record.getMessage())
        return True

    logger.addFilter(keep)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeFilter(keep)
        logger.setLevel(level)
    for message in messages:
        if message.startswith("Missing keys"):
            held = message.partition("(")[2].partition(")")[0]
            warnings.warn(
                f"the pretrained weights of {config.tag!r} lack {held}: these start from random "
                "values",
                stacklevel=3,
            )


def _set_pool(model: Any, config: schema.ImageEncoder) -> None:
    """Choose the pooling without changing where the model keeps its norms."""
    pool = config.pool
    has_class_token = bool(
        getattr(model, "has_class_token", getattr(model, "cls_token", None) is not None)
    )
    if pool == "cls" and not has_class_token:
        raise _fault(config, "pool", "has no class token to pool by; choose mean or model")
    if pool == "auto" and ("global_pool" in config.param or not has_class_token):
        return
    wanted = "avg" if pool == "mean" else "token"
    if pool == "model" or getattr(model, "global_pool", None) == wanted:
        return
    try:
        model.reset_classifier(0, global_pool=wanted)
    except (AssertionError, TypeError, ValueError, RuntimeError) as error:
        if pool != "auto":
            text = f"cannot pool by {pool!r} ({error}); choose model"
            raise _fault(config, "pool", text) from error
