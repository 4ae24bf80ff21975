"""A token a byte: needs neither files nor training, and knows every text. 260 ids."""

from collections.abc import Callable, Iterator
from pathlib import Path

from engine.config import schema
from engine.data.text.byte_level import finish, untrained
from engine.data.text.tokenizer import TextTokenizer


def build(
    config: schema.Tokenizer,
    *,
    captions: Callable[[], Iterator[str]] | None = None,
    folder: Path | None = None,
) -> TextTokenizer:
    """The byte tokenizer; it has no options."""
    return finish(untrained(split_words=False))
