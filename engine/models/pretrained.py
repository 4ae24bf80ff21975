"""transformers' models by hub id, local folder, or sizes alone, and what may be wrong with them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn

from engine.errors import UserError, first_line
from engine.registry import nearest

_POSITIONS = re.compile(r"(^|\.)(position_embeddings?|embed_positions|wpe)$")


def vocabulary(vocab_size: int, pad_id: int | None) -> dict[str, Any]:
    """A tokenizer's sizes as a language model's options."""
    pad = {} if pad_id is None else {"pad_token_id": pad_id}
    return {"vocab_size": vocab_size, **pad}


@dataclass(frozen=True, slots=True)
class Part:
    """A part of the model that transformers builds: ``tag``'s, or one of random weights."""

    what: str  # "text encoder"
    key: str  # of its section: model.text_encoder
    tag: str | None  # hub id or folder
    options: dict[str, Any]  # of its configuration
    pretrained: bool
    option_key: str = "config"  # under which the section has them

    @property
    def name(self) -> str:
        """How a message calls the model."""
        return f"{self.what} {self.tag or self.options.get('model_type')!r}"

    @property
    def model_key(self) -> str:
        """The key that chose the kind of model."""
        return f"{self.key}.tag" if self.tag else f"{self.key}.{self.option_key}.model_type"

    def _fault(self, key: str, text: str) -> UserError:
        return UserError(text, key=f"{self.key}.{key}")

    def configuration(
        self, examples: str, defaults: dict[str, Any], half: str = "text_config"
    ) -> transformers.PretrainedConfig:
        """The model's own configuration: the tag's, or one of sizes alone, with ``options``.

        ``defaults`` are those of sizes alone; ``half`` is the part of a configuration of CLIP or
        the like; ``examples`` names some kinds. Raises UserError.
        """
        found = self._start(examples)
        found = getattr(found, half, None) or found
        options, section = dict(self.options), self.option_key
        kind = options.pop("model_type", None)
        if self.tag is not None and kind not in (None, found.model_type):
            text = f"{self.tag!r} is a {found.model_type!r} model, not {kind!r}"
            raise self._fault(f"{section}.model_type", f"{text}: leave model_type out")
        known = {*found.to_dict(), *found.attribute_map} - {"model_type", "transformers_version"}
        for option in options:
            if option not in known:
                text = f"a {found.model_type!r} model has no option {option!r}"
                hint = nearest(option, sorted(known))
                raise self._fault(f"{section}.{option}", f"{text}; {hint}")
        if self.tag is not None:
            for option, value in options.items():
                setattr(found, option, value)
            return found
        try:  # built again, since sizes derive from one another
            with only_errors():  # its default ids of special tokens are of another vocabulary
                return type(found)(**defaults | options)
        except (StrictDataclassError, ValueError, TypeError) as error:
            last = str(error).splitlines()[-1].strip()
            text = f"{found.model_type!r} refuses its options: {last}"
            raise self._fault(section, text) from error

    def _start(self, examples: str) -> Any:
        """The tag's configuration, or the default one of ``model_type``."""
        if self.tag is not None:
            try:
                return cached_first(transformers.AutoConfig, self.tag)
            except (OSError, ValueError, KeyError) as error:
                raise self._unavailable(error) from error
        if self.pretrained:
            raise self._fault("tag", "pretrained needs a tag to load from")
        kind, kinds = self.options.get("model_type"), [str(k) for k in transformers.CONFIG_MAPPING]
        if kind in kinds:
            return transformers.AutoConfig.for_model(kind)
        hint = nearest(str(kind), kinds)
        hint = hint if hint.startswith("did") else f"known are {examples} and more"
        text = f"transformers has no model_type {kind!r}; {hint}"
        if kind is None:
            text = f"a {self.what} needs a tag (hub id or folder) or a model_type"
        raise UserError(text, key=self.model_key)

    def _unavailable(self, error: Exception) -> UserError:
        """The error of a tag that cannot be loaded, with what to do."""
        return self._fault(
            "tag",
            f"cannot get {self.what} {self.tag!r}: {first_line(error)}; download it where there is "
            "network and copy the cache (HF_HOME), name a local folder, or describe a model with "
            f"random weights by {self.option_key}.model_type",
        )

    def load(self, auto: Any, configuration: Any, **options: Any) -> tuple[Any, list[str]]:
        """The model of ``configuration``, with the tag's weights if ``pretrained``; and names of
        parameters that the tag's weights lack. Raises UserError; warnings are held back."""
        try:
            with only_errors():
                if not self.pretrained:
                    return auto.from_config(configuration, **options), []
                model, found = cached_first(
                    auto, self.tag, config=configuration, dtype=torch.float32,
                    output_loading_info=True, **options,
                )  # fmt: skip
                return model, sorted(found["missing_keys"])
        except OSError as error:
            raise self._unavailable(error) from error
        except SafetensorError as error:
            text = f"the weights of {self.name} are damaged: {error}; download them again"
            raise self._fault("tag", text) from error
        except (ValueError, TypeError, RuntimeError, AssertionError, KeyError) as error:
            text = f"transformers cannot build {self.name} with {self.options}: {first_line(error)}"
            raise self._fault(self.option_key if self.options else "tag", text) from error

    def check_sizes(self, model: Any, vocab_size: int, max_length: int) -> None:
        """Raises UserError where ids or positions are asked for that the model has no row for."""
        known, limit = model.get_input_embeddings().num_embeddings, max_positions(model)
        if known < vocab_size:
            text = f"the tokenizer has {vocab_size} ids but {self.name} knows only {known}"
            remedy = "use the model's own tokenizer, or a larger vocab_size"
            raise self._fault("tokenizer", f"{text}; {remedy}")
        if limit is not None and max_length > limit:
            text = f"max_length {max_length} is more than the {limit} positions of {self.name}"
            raise self._fault("max_length", text)

    def checkpoint_activations(self, model: Any) -> None:
        """Recompute activations in backward. Raises UserError for a model that cannot."""
        try:
            # its name before transformers 5.23 is a deprecated one today
            enable = getattr(model, "activation_checkpointing_enable", None)
            (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
        except ValueError as error:
            text = f"{self.name} has no gradient checkpointing; set it to false"
            raise self._fault("gradient_checkpointing", text) from error


def without_pooling_layer(configuration: transformers.PretrainedConfig) -> dict[str, Any]:
    """The option of AutoModel that leaves a pooling layer out, which nothing would train."""
    mapped: Any = transformers.MODEL_MAPPING.get(type(configuration), None)
    has_it = isinstance(mapped, type) and "add_pooling_layer" in (
        inspect.signature(mapped).parameters
    )
    return {"add_pooling_layer": False} if has_it else {}


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
