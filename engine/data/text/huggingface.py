"""The tokenizer of a Hugging Face model: a hub id or a local folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from engine.config import schema
from engine.data.text.tokenizer import ROLES, Captions, TextTokenizer
from engine.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NAMES = ("huggingface_modelzoo",)
_KEY = "model.text_encoder.tokenizer.tag"


def build(config: schema.Tokenizer, *, captions: Captions = None) -> TextTokenizer:
    """The tokenizer ``config.tag``. Raises UserError where there is none, or it needs code to run.

    Code that comes with a tokenizer is never run.
    """
    if config.tag is None:
        raise UserError("tokenizer 'huggingface' needs a tag: a hub id or a local folder", key=_KEY)
    theirs = _read(config.tag)
    backend = getattr(theirs, "backend_tokenizer", None)
    if backend is None:
        raise UserError(
            f"tokenizer {config.tag!r} ({type(theirs).__name__}) has no fast form "
            "(tokenizer.json); save one with transformers, or use another tag",
            key=_KEY,
        )
    tokens = {role: getattr(theirs, f"{role}_token", None) for role in ROLES}
    return TextTokenizer(backend, {role: str(token) for role, token in tokens.items() if token})


def _read(tag: str) -> PreTrainedTokenizerBase:
    place = Path(tag).expanduser()
    if not place.is_dir() and (place.is_absolute() or tag.startswith((".", "~"))):
        raise UserError(f"no tokenizer folder {tag}", key=_KEY)
    import engine.torchvision_ops  # noqa: F401, I001  must come before what imports torchvision
    from transformers import AutoTokenizer

    name = str(place) if place.is_dir() else tag
    try:
        try:  # a cached copy first: without a network, a request takes most of a minute
            return AutoTokenizer.from_pretrained(
                name, trust_remote_code=False, local_files_only=True
            )
        except (OSError, ValueError):
            return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # of many kinds: network, missing files, a format too new, damage
        first_line = str(error).strip().split("\n", 1)[0]
        raise UserError(
            f"cannot read tokenizer {tag!r}: {first_line} "
            "(offline, name a local folder that holds its tokenizer.json)",
            key=_KEY,
        ) from error
