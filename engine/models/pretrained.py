"""transformers' models by hub id, local folder, or sizes alone: what may go wrong, said plainly."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from huggingface_hub.errors import StrictDataclassError

import engine.torchvision_ops  # noqa: F401  before transformers, which imports torchvision

import transformers  # isort: skip
from engine.errors import UserError
from engine.registry import nearest


class Section(Protocol):
    """What text encoders and decoders have in common in the configuration."""

    tag: str | None
    config: dict[str, Any]
    pretrained: bool


def configuration(
    section: Section,
    *,
    key: str,
    what: str,
    examples: str,
    vocab_size: int,
    pad_id: int | None,
    more: dict[str, Any] | None = None,
) -> transformers.PretrainedConfig:
    """The model's own configuration: the tag's, or a class's defaults, under ``section.config``.

    ``more`` are defaults that the caller wants where the class knows them and ``config`` does not
    say otherwise. Raises UserError at ``key``; ``what`` names the part, ``examples`` some kinds.
    """
    options = {name: value for name, value in section.config.items() if name != "model_type"}
    if section.tag is not None:
        found = _of_tag(section, key, what)
        _check_options(found, options, key)
        for option, value in options.items():
            setattr(found, option, value)
        return found
    found = text_half(transformers.AutoConfig.for_model(_kind(section, key, what, examples)))
    _check_options(found, options, key)
    options.setdefault("vocab_size", vocab_size)
    if pad_id is not None:
        options.setdefault("pad_token_id", pad_id)
    for option, value in (more or {}).items():
        options.setdefault(option, value)
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


def _of_tag(section: Section, key: str, what: str) -> transformers.PretrainedConfig:
    try:
        found = cached_first(transformers.AutoConfig, section.tag)
    except (OSError, ValueError, KeyError) as error:
        raise unavailable(section, error, key=key, what=what) from error
    found = text_half(found)
    kind = section.config.get("model_type")
    if kind not in (None, found.model_type):
        raise UserError(
            f"{section.tag!r} is a {found.model_type!r} model, not {kind!r}: leave model_type out",
            key=f"{key}.config.model_type",
        )
    return found


def text_half(found: transformers.PretrainedConfig) -> transformers.PretrainedConfig:
    """The language model's part of a configuration of CLIP and its kin."""
    return getattr(found, "text_config", None) or found


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


def cached_first(auto: Any, tag: str | None, **options: Any) -> Any:
    """Load without asking the hub where that suffices: offline its retries take most of a minute.

    Code that comes with a model is never run.
    """
    try:
        return auto.from_pretrained(tag, local_files_only=True, trust_remote_code=False, **options)
    except OSError:
        return auto.from_pretrained(tag, trust_remote_code=False, **options)


@contextmanager
def only_errors() -> Iterator[None]:
    """transformers' warnings held back within the block."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before)
