"""transformers' models by hub id, local folder, or sizes alone: what may go wrong, said plainly."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn

import engine.torchvision_ops  # noqa: F401  before transformers, which imports torchvision

import transformers  # isort: skip
from engine.errors import UserError
from engine.registry import nearest

_POSITIONS = re.compile(r"(^|\.)(position_embeddings?|embed_positions|wpe)$")


class Section(Protocol):
    """What text encoders and decoders have in common in the configuration."""

    tag: str | None
    config: dict[str, Any]
    pretrained: bool


def text_half(found: transformers.PretrainedConfig) -> transformers.PretrainedConfig:
    """The language model's part of a configuration of CLIP and its kin."""
    return getattr(found, "text_config", None) or found


def vision_half(found: transformers.PretrainedConfig) -> transformers.PretrainedConfig:
    """The image encoder's part of a configuration of CLIP and its kin."""
    return getattr(found, "vision_config", None) or found


def vocabulary(vocab_size: int, pad_id: int | None) -> dict[str, Any]:
    """A tokenizer's sizes as a language model's options."""
    pad = {} if pad_id is None else {"pad_token_id": pad_id}
    return {"vocab_size": vocab_size, **pad}


def configuration(
    section: Section,
    *,
    key: str,
    what: str,
    examples: str,
    more: dict[str, Any],
    half: Callable[[Any], Any] = text_half,
) -> transformers.PretrainedConfig:
    """The model's own configuration: the tag's, or a class's defaults, under ``section.config``.

    ``more`` are defaults of a model from sizes alone, where ``config`` does not say otherwise;
    ``half`` takes the part out of a configuration of CLIP and its kin. Raises UserError at ``key``;
    ``what`` names the part, ``examples`` some kinds.
    """
    options = {name: value for name, value in section.config.items() if name != "model_type"}
    if section.tag is not None:
        found = _of_tag(section, key, what, half)
        _check_options(found, options, key)
        for option, value in options.items():
            setattr(found, option, value)
        return found
    found = half(transformers.AutoConfig.for_model(_kind(section, key, what, examples)))
    _check_options(found, options, key)
    options = more | options
    try:  # built anew, since sizes derive from one another
        with only_errors():  # its default ids of special tokens are of another vocabulary
            return type(found)(**options)
    except (StrictDataclassError, ValueError, TypeError) as error:
        raise UserError(
            f"{found.model_type!r} refuses its options: {str(error).splitlines()[-1].strip()}",
            key=f"{key}.config",
        ) from error


def _kind(section: Section, key: str, what: str, examples: str) -> str:
    """The model_type to start from random weights, checked."""
    at = f"{key}.config.model_type"
    if section.pretrained:
        raise UserError("pretrained needs a tag to load from", key=f"{key}.tag")
    if "model_type" not in section.config:
        raise UserError(f"a {what} needs a tag (hub id or folder) or a model_type", key=at)
    kind = section.config["model_type"]
    kinds = [str(known) for known in transformers.CONFIG_MAPPING]
    if kind not in kinds:
        hint = nearest(str(kind), kinds)
        hint = hint if hint.startswith("did") else f"known are {examples} and more"
        raise UserError(f"transformers has no model_type {kind!r}; {hint}", key=at)
    return kind


def _of_tag(
    section: Section, key: str, what: str, half: Callable[[Any], Any]
) -> transformers.PretrainedConfig:
    try:
        found = cached_first(transformers.AutoConfig, section.tag)
    except (OSError, ValueError, KeyError) as error:
        raise unavailable(section, error, key=key, what=what) from error
    found = half(found)
    kind = section.config.get("model_type")
    if kind not in (None, found.model_type):
        raise UserError(
            f"{section.tag!r} is a {found.model_type!r} model, not {kind!r}: leave model_type out",
            key=f"{key}.config.model_type",
        )
    return found


def _check_options(found: transformers.PretrainedConfig, options: dict[str, Any], key: str) -> None:
    known = {*found.to_dict(), *found.attribute_map} - {"model_type", "transformers_version"}
    for option in options:
        if option not in known:
            raise UserError(
                f"a {found.model_type!r} model has no option {option!r}; "
                f"{nearest(option, sorted(known))}",
                key=f"{key}.config.{option}",
            )


def unavailable(section: Section, error: Exception, *, key: str, what: str) -> UserError:
    """The error of a tag that cannot be loaded, with what to do."""
    said = (str(error).splitlines() or [type(error).__name__])[0]
    return UserError(
        f"cannot get {what} {section.tag!r}: {said}; download it where there is network and "
        "copy the cache (HF_HOME), name a local folder, or describe a model with random weights "
        "by config.model_type",
        key=f"{key}.tag",
    )


@contextmanager
def building(section: Section, *, key: str, what: str, options: str = "config") -> Iterator[None]:
    """Turns what transformers raises within the block into UserErrors; its warnings are held back.

    ``options`` is the key under which the sizes of ``section.config`` were written.
    """
    try:
        with only_errors():
            yield
    except OSError as error:
        raise unavailable(section, error, key=key, what=what) from error
    except SafetensorError as error:
        raise UserError(
            f"the weights of {name(section)} are damaged: {error}; get them anew", key=f"{key}.tag"
        ) from error
    except (ValueError, TypeError, RuntimeError, AssertionError, KeyError) as error:
        raise UserError(
            f"transformers cannot build {name(section)} with {section.config}: "
            f"{(str(error).splitlines() or [type(error).__name__])[0]}",
            key=f"{key}.{options}" if section.config else f"{key}.tag",
        ) from error


def name(section: Section) -> str:
    """How a message calls the model."""
    return repr(section.tag or section.config.get("model_type"))


def checkpoint_activations(model: Any, section: Section, *, key: str, what: str) -> None:
    """Recompute activations in backward. Raises UserError for a model that cannot."""
    try:
        # its name before transformers 5.23 is a deprecated one today
        enable = getattr(model, "activation_checkpointing_enable", None)
        (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
    except ValueError as error:
        raise UserError(
            f"{what} {name(section)} has no gradient checkpointing; set it to false",
            key=f"{key}.gradient_checkpointing",
        ) from error


def cached_first(auto: Any, tag: str | None, **options: Any) -> Any:
    """Load without asking the hub where that suffices: offline its retries take most of a minute.

    Code that comes with a model is never run.
    """
    try:
        return auto.from_pretrained(tag, local_files_only=True, trust_remote_code=False, **options)
    except OSError:
        return auto.from_pretrained(tag, trust_remote_code=False, **options)


def max_positions(model: nn.Module) -> int | None:
    """Tokens that the model has learned positions for; None where positions are computed."""
    for name, module in model.named_modules():
        if _POSITIONS.search(name) and isinstance(module, nn.Embedding):
            # RoBERTa counts from behind the padding index, BART from a fixed offset
            unused = module.padding_idx + 1 if module.padding_idx is not None else 0
            return module.num_embeddings - max(unused, getattr(module, "offset", 0))
    return None


@contextmanager
def only_errors() -> Iterator[None]:
    """transformers' warnings held back within the block."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before)
